"""Analyses of a graph: token axes, products, host ops, costs. Nothing here edits the graph."""
