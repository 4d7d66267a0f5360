"""How one rank traces, keeps, loads and runs its shard.

Read `base` (the protocol), `program` (a traced program on disk), `artifact` (all ranks' programs and what
vouches for them), then a runtime: `cpu`.
"""
