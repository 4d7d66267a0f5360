"""How N ranks become one model. The only code that creates Ray actors.

Read `group` (start, step, restart, stop), then `worker` (one rank), `wire` (what they say to each other),
`ranks` (how ranks come to be), `placement` and `cores` (where).
"""
