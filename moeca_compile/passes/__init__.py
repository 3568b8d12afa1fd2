"""Passes over the captured graph, in the order of the data. `backend.py` calls them.

    export.py    Dynamo's graph -> functional ATen with a fake value on every node
    runner.py    -> the forms that matching knows: runs the passes of normalize/, one pass a file
    analysis/    answers questions about a graph (token axis, costs, host ops); edits nothing
    match/       -> frozen Regions: routers, experts, attentions, feed-forwards, the timestep; edits nothing
    rewrite/     -> a step as a function: the graph evaluated with values replaced, on all or on chosen tokens

`dump.py` and `graph_text.py` write the graph after each stage for people.
"""
