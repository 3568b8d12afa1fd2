"""Passes over the captured graph, in the order in which `backend.py` names them.

`export` makes the graph functional ATen; `token_axis`, `residuals`, `attention` and `experts` match frozen
regions in it and never edit; `rows` and `evaluate` run parts of it, also on chosen tokens only.
"""
