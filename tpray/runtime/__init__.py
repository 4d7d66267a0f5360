"""How one rank traces, loads and runs its shard. No Ray, and no group: a runtime sees one rank.

Read `base` (the protocol), `exported` (a traced program on disk), `shaped` (programs of static shapes), then a kind of
core: `cpu.runtime`, `neuron.torchneuron`, `neuron.xla`.
"""
