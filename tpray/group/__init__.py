"""How N ranks become one model: their states, the wire, and what starts them. The only creator of Ray actors.

Read `group` (start, step, restart, stop) with `lifecycle` and `supervisor`, then `channel` and `wire` (how steps reach
the ranks), `worker` (one rank), `executor` (how ranks come to be), `placement` (where). What the ranks compute is
`classifier` or `user_model`. No HTTP, no text.
"""
