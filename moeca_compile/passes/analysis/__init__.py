"""What is read off a graph: token axes, products, host reads, costs. Nothing here edits one."""
