"""Scripts in the manner of those that people have for neuronx-distributed, with ``tpray`` in its place.

They import neither Ray nor pytest, so that what traces them may be anything: `SCRIPTS` is all of them.
"""

from tests.trace.scripts import bert, cache, convolutions, diffusion, embeddings, gqa, t5
from tests.trace.scripts.script import Script

__all__ = ["SCRIPTS", "Script"]

SCRIPTS: list[Script] = [
    bert.SCRIPT,
    t5.SCRIPT,
    diffusion.SCRIPT,
    gqa.FUSED,
    gqa.SEPARATE,
    convolutions.SCRIPT,
    embeddings.SCRIPT,
    cache.SCRIPT,
]
