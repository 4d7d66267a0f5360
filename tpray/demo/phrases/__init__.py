"""The phrasings of the demo's world, by subject (their syntax is explained in ``tpray.demo.data``)."""

from __future__ import annotations

from . import business, daily, people, places, sentences, things

TABLES: tuple[str, ...] = tuple(module.TABLE for module in (people, daily, business, places, things, sentences))
