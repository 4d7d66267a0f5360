"""``python -m tpray`` is the same as ``tpray``."""

from tpray.commands.cli import main

main()
