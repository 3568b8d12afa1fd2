"""Costs of a graph as expressions in its sizes."""
