"""Made-up names: unknown names must be compared piece by piece, and only many of them teach that."""

from __future__ import annotations

import random

_SYLLABLES = {
    "onset": "b c d f g h j k l m n p r s t v w z b d g k l m n r s t br ch cl dr gr kr pl sh st tr qu",
    "vowel": "a e i o u a e i o a e i o ai ea ee io oo ou y",
}
_CODAS = ["", "", "", "", "", "", "n", "r", "l", "s", "m", "x", "t", "k", "nd", "ck"]
_NAME_PARTS = {
    "brand": "Bright Smiling Running Open Blue Silver Quick Deep Cloud Data Sun Star Green Happy Jumping "
    "Iron North Red Smart Talking Shining Moon Snow Stone Wild Magic Micro Tele Bio Net Robo Fire Crypto "
    "Game Health Food Home Learn Good Night",
    "maker": "Mind Works Soft Hand Box Leaf Bird Lab Labs Ware Forge Line Bank Field Gate Tree Heart Eye "
    "Point Base Bridge Motors Systems Foods Air Pay Health House Games Space Net Wave Wolf Chip Book Cart "
    "Light Face Foot",
    "title": "Silent Broken Golden Last Hidden Endless Lonely Burning Frozen Secret Distant Forgotten Crimson Hollow",
    "topic": "River Garden Mountain Winter Promise Kingdom Voyage Island Shadow Harbour Letter Ocean Crown",
}

# Words that several names may share.
COMMON = frozenset(" ".join([*_NAME_PARTS.values(), "the United City FC"]).lower().split())


def invented_name(kind: str, rng: random.Random) -> str:
    """A made-up name for an entity of ``kind``."""

    def name(syllables: int) -> str:
        onsets, vowels = _SYLLABLES["onset"].split(), _SYLLABLES["vowel"].split()
        return "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(_CODAS) for _ in range(syllables))

    def part(table: str) -> str:
        return rng.choice(_NAME_PARTS[table].split())

    if kind == "company" and rng.random() < 0.5:
        made = part("brand") + rng.choice(["", "", " "]) + part("maker")
    elif kind == "company":
        made = name(rng.choice([2, 2, 3])).capitalize() + rng.choice(["", "", "", " Labs", " Motors", " Foods"])
    elif kind == "person":
        made = name(2).capitalize() + ("" if rng.random() < 0.7 else " " + name(2).capitalize())
    elif kind == "team":
        made = rng.choice(["the {}s", "{} United", "{} City", "FC {}"]).format(name(2).capitalize())
    elif kind == "title":
        made = f"The {part('title')} {part('topic')}"
    elif kind == "amount":
        made = str(rng.choice([rng.randrange(21, 1000), 10 * rng.randrange(101, 1000)]))
    else:
        made = name(2).capitalize() if kind in ("city", "country") else name(2)
    return made
