"""From a step as a function to compiled, checked code."""
