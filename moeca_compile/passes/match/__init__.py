"""Find routers, experts, attentions and feed-forwards: frozen regions. Nothing here edits the graph."""
