"""Run the graph with some of its values replaced, also on chosen tokens only: a step as a function."""
