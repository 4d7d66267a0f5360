"""``python -m tpray`` is the same as ``tpray``."""

from tpray.cli import main

main()
