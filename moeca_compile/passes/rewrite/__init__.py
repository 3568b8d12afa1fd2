"""Steps as functions: evaluate the graph with some values replaced, on all tokens or on chosen ones."""
