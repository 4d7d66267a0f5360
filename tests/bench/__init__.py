"""The side-by-side of tpray and its peers: ``make bench``, or ``python -m tests.bench --short`` for a quick look."""
