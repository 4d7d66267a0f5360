"""The demo's small world: who and what its sentences can be about, and which words mean the same.

Two kinds of vocabulary are kept apart:

* *words* (verbs, qualities, times, jobs, ...) are shared by training and evaluation. A classifier trained
  from scratch can only know the synonyms it was shown, so they are listed here.
* *entities* (people, companies, places, dishes, things, teams, numbers, ...) are split in two: those after
  the ``|`` of a table, and the last fifth of every pool of made-up names, are never trained on.

One piece of geography is part of the training world: some cities go by the name of one of their districts
(New York City and Manhattan, London and Westminster, ...). Such knowledge cannot be guessed for an unseen
place, so the evaluation half of the world has no such pairs.

Table syntax: ``,`` separates concepts, ``=`` separates synonyms, ``/`` separates the given forms of a verb
(base, past, participle, -ing) and ``+`` ends it.
"""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Literal

from .names import COMMON, invented_name
from .phrases import TABLES

Split = Literal["train", "held_out"]
Word = tuple[str, ...]  # the forms of one word: base, third person, past, participle, -ing (nouns have one form)
Concept = tuple[Word, ...]  # interchangeable words
FORMS = {"base": 0, "s": 1, "past": 2, "done": 3, "ing": 4}

VERBS = {
    "make": "buy/bought=purchase, sell/sold, repair=fix=mend, break/broke/broken, paint, lose/lost, "
    "find/found, steal/stole/stolen, clean=wash, borrow, hide/hid/hidden, carry, destroy=ruin, move, "
    "design, build/built=construct, open, close/closed=shut/shut/shut/shutting, use, photograph, "
    "choose/chose/chosen=pick, run/ran/run/running=operate, forget/forgot/forgotten/forgetting",
    "meet": "call=phone, help=assist, thank, visit, invite, teach/taught, criticise=criticize, follow, "
    "hire=employ, see/saw/seen, hear/heard, praise, push, love=adore, hate=detest, trust, "
    "defeat=beat/beat/beaten, hug/hugged/hugged/hugging=embrace, kiss, warn, ignore, blame, interview, "
    "remember, surprise, save=rescue, attack",
    "hunt": "chase, bite/bit/bitten, watch, follow, scare=frighten, attack, hear/heard, find/found, see/saw/seen",
    "cook": "cook=prepare=make/made, eat/ate/eaten, order, burn/burned, taste, bring/brought, share, "
    "serve, buy/bought=purchase, throw/threw/thrown+away",
    "write": "write/wrote/written, read/read/read, publish, translate, review, buy/bought=purchase, "
    "finish=complete, begin/began/begun/beginning=start, recommend, illustrate",
    "activity": "play+football=play+soccer, swim/swam/swum/swimming, read/read/read+a book, "
    "watch+television=watch+tv, play+the guitar, play+the piano, cook+dinner=make/made+dinner, "
    "sing/sang/sung, dance, run/ran/run/running=jog/jogged/jogged/jogging, sleep/slept, "
    "ride/rode/ridden+a bike=ride/rode/ridden+a bicycle, clean+the house, paint+a picture, "
    "drink/drank/drunk+coffee, eat/ate/eaten+lunch, write/wrote/written+a letter, work+in the garden, "
    "drive/drove/driven+a car, walk+the dog, play+chess, wash+the dishes=do/did/done+the dishes, study, "
    "climb+a tree, feed/fed+the cat, talk+on the phone=speak/spoke/spoken+on the phone, play+tennis, "
    "ride/rode/ridden+a horse, cut/cut/cut/cutting+an onion=slice+an onion, take/took/taken+a nap, smoke, "
    "cry, laugh",
}

WORDS = {
    "guest": "her friends, his family, the children=the kids, the guests=the visitors, her mother=her "
    "mom, his neighbours=his neighbors, the whole team, his father=his dad, her sister, his "
    "colleagues=his coworkers, the students, her boss=her manager, everyone=everybody",
    "where": "in the kitchen, in the garden=in the yard, at school, at home=in the house, in the park, at "
    "the office=at work, on the beach, in the street=on the street, at the station, in the library, at "
    "the market, in the forest=in the woods, near the river, at the hotel, in the hospital, on the bus",
    "when": "yesterday, last week, last year, this morning, this week, two days ago, last night, a month "
    "ago, in 2019, in 2021, on Monday, on Tuesday, on Friday, on Sunday, in the summer, in the winter, in "
    "May, in March, in the afternoon, this evening, today, long ago, an hour ago",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Christmas Eve",
    "month": "January, February, March, April, May, June, July, August, September, October, November, December",
    "hour": "one=one o'clock, two=2=two o'clock, three=3=three o'clock, four=4, five=5=five o'clock, "
    "six=6, seven=7=seven o'clock, eight=8=eight o'clock, nine=9=nine o'clock, ten=10=ten o'clock, "
    "eleven=11, noon=midday=twelve, midnight, half past two, half past six, quarter past nine",
    "count": "two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, "
    "twenty=20, thirty=30, forty=40, fifty=50, a hundred=100, a thousand=1000, many=a lot of=lots of, few",
    "colour": "red, blue, green, yellow, black, white, brown, pink, purple, grey=gray, orange",
    "quality": "big=large, small=little=tiny, old, new, expensive=costly, cheap=inexpensive, heavy, "
    "light, fast=quick, slow, beautiful=pretty, ugly, broken, clean, dirty, empty, full, famous=well "
    "known, dangerous, safe, easy=simple, difficult=hard, boring=dull, interesting, terrible=awful, "
    "excellent=great=wonderful, strong, weak, loud=noisy, quiet, long, short, modern, strange=odd, "
    "important, useful, useless",
    "taste": "delicious=tasty, sweet, salty, spicy=hot, bitter, sour, fresh, cold, awful=terrible, good, "
    "bad, expensive, cheap",
    "mood": "happy=glad, sad=unhappy, angry=furious=mad, tired=exhausted, ill=sick=unwell, hungry, "
    "thirsty, nervous=anxious=worried, bored, afraid=scared=frightened, proud, calm, busy, healthy=well, "
    "rich=wealthy, poor, smart=clever=intelligent, stupid, kind=nice, rude=impolite, lazy, famous, tall, "
    "honest, late, married, alone",
    "job": "doctor=physician, teacher, lawyer=attorney, nurse, engineer, cook=chef, driver, "
    "writer=author, police officer=policeman, farmer, painter, singer, student, baker, pilot, actor, "
    "scientist, soldier, programmer=software developer, journalist=reporter, waiter, dentist, judge, "
    "banker, musician, gardener",
    "relation": "mother=mom, father=dad, boss=manager, uncle, aunt, daughter, son, teacher, doctor, student, "
    "lawyer=attorney, grandfather, grandmother, driver, coach",
    "kin": "brother, sister, neighbour=neighbor, cousin, best friend, colleague=coworker, husband, wife, mother=mom, "
    "father=dad, boss=manager, son, daughter, uncle, aunt",
    "human": "man=guy, woman=lady, boy, girl, child=kid, old man, young woman, teacher, doctor, student, baby, soldier",
    "weather": "nice=lovely, bad=awful, sunny, rainy=wet, cloudy=overcast, windy, snowy, foggy=misty, "
    "stormy, hot=very warm, cold=chilly, warm, dry, icy=freezing",
    "vehicle": "train, bus, plane=airplane, car, bike=bicycle, boat=ship, ferry, taxi=cab, motorcycle, tram",
    "room": "kitchen, bedroom, bathroom, garden, garage, cellar=basement, office, hall, living room, library",
    "season": "spring, summer, autumn=fall, winter",
    "illness": "cold, fever, headache, cough, broken leg, broken arm, toothache, heart disease, flu, cancer, back pain",
    "organ": "health, heart, skin, teeth, brain, stomach, bones, eyes, liver, lungs",
    "deed": "call, pay, come, wait, leave, help, stay, travel, vote, win, swim, drive, dance, cook, sing, "
    "speak, sleep, study, work, return=come back, quit=resign, apologise=apologize=say sorry, smoke, "
    "drink, move, marry",
    "pronoun": "he, she",
    "subject": "I, he, she, we, they, you",
    "speaker": "I, we, they, you, people, my parents, children=kids",
    "event": "storm, meeting, concert, party, war, game=match, lesson=class, wedding, exam=test, "
    "accident=crash, election",
    "work": "movie=film, book, song, concert, play, show, story, party, hotel, restaurant, food=meal, "
    "trip=journey, game=match, exam=test, weather, city=town, house=home, service, idea, answer=reply",
    "goods": "shoes, clothes=clothing, software=computer programs, furniture, toys, cars=automobiles, "
    "phones, food, medicine=drugs, books, computers, electricity, insurance, machines, paper, glass, "
    "jewellery=jewelry, robots",
    "shop": "shop=store, restaurant, museum, library, bank, school, office, pharmacy=drugstore, "
    "cinema=movie theater, post office, bakery, market, gym, swimming pool, hotel",
}

ENTITIES = {
    "person": "Marie, Peter, Anna, John, Maria, David, Sarah, Paul, Julia, Thomas, Emma, Mark, Laura, "
    "Daniel, Sophie, Michael, Clara, Robert, Alice, James, Susan, George, Helen, Victor, Nina, Simon, "
    "Olga, Ahmed, Fatima, Yuki, Chen, Priya, Carlos, Elena, Ivan, Lucy, Oscar, Ruth, Adam, Eva, Bob, "
    "Jack, Tom, Mary, Linda, Kevin, Omar, Lisa, Martin, Kate, Ben, Mia, Leo, Zoe, my brother, my sister, "
    "my mother=my mom, my father=my dad, the man, the woman, the boy, the girl, my friend, our teacher, "
    "my boss=my manager | Pierre, Hannah, Felix, Rosa, Igor, Amara, Bruno, Greta, Hugo, Ingrid, Jonas",
    "city": "New York City=New York=Manhattan, New York City=New York=NYC=Manhattan, London=Westminster, "
    "Paris=Montmartre, Berlin=Kreuzberg, Tokyo=Shinjuku, Rome=Trastevere, Los Angeles=LA=Hollywood, "
    "Boston=Back Bay, Hong Kong=Kowloon, Istanbul=Beyoglu, Copenhagen, Stockholm, "
    "Seoul=Gangnam, Barcelona, San Francisco, Chicago, Madrid, Vienna, Oslo, Munich, "
    "Milan, Sydney, Toronto, Lisbon, Dublin, Cairo, Delhi, Moscow, Prague, Warsaw, Zurich, Geneva, "
    "Brussels, Amsterdam, Seattle, Miami, Houston, Denver, Beijing, Shanghai, Mumbai, Nairobi | Athens, "
    "Budapest, Helsinki, Dallas, Osaka, Lima, Montreal, Hamburg, Naples, Porto",
    "country": "France, Germany, Italy, Spain, Japan, China, India, Brazil, Canada, Mexico, Egypt, Kenya, "
    "Norway, Sweden, Poland, Russia, Turkey, Greece, Portugal, Ireland, Australia | Chile, Peru, Denmark, "
    "Finland, Austria, Morocco",
    "dish": "dinner, lunch, breakfast, pasta, pizza, soup, rice, bread, cake, fish, chicken, salad, "
    "cheese, meat, coffee, chocolate, fruit, milk, tea, beer | beef, curry, pie, sushi, yogurt",
    "food": "bananas, carrots, onions, nuts, cookies, eggs, potatoes, beans, oranges, tomatoes, burgers, "
    "vegetables, mushrooms, sweets=candies, cigarettes, soft drinks, grapes, lemons, pears, cherries | "
    "apples, olives, peaches, berries, noodles, plums",
    "thing": "car, bike, house, phone, book, table, chair, lamp, watch, ring, guitar, computer, bag, key, "
    "boat, camera, picture, letter, coat, shirt, hat, box, bottle, cup, door, window, knife, piano, "
    "radio, ticket, map, bed, ball, toy, television, clock, umbrella, pen | violin, ladder, carpet, "
    "mirror, wallet, drum, basket, helmet",
    "animal": "dog, cat, horse, cow, bird, mouse, lion, bear, fish, rabbit, wolf, snake, sheep, monkey, "
    "duck | goat, tiger, fox, spider, camel",
    "sport": "football, tennis, chess, basketball, golf, hockey, baseball, volleyball, cricket | rugby, "
    "judo, badminton",
    "subject": "history, mathematics=maths=math, physics, biology, music, art, chemistry, law, "
    "philosophy, medicine | geography, economics, astronomy",
    "language": "French, German, English, Spanish, Italian, Chinese, Japanese, Russian, Arabic | Dutch, "
    "Hindi, Polish, Swahili",
    "company": "Google, Microsoft, Apple, Amazon, Siemens, Toyota, Samsung, Sony, Nokia, Boeing | Airbus, "
    "Intel, Ikea, Bosch",
    "team": "",
    "title": "",
    "noun": "",
    "amount": "",
}


def _conjugate(text: str) -> Word:
    """The five forms of ``"write/wrote/written+a letter"``; those not given follow the regular rule."""
    head, _, tail = text.partition("+")
    base, *given = head.split("/")
    stem = base[:-1] if base.endswith("e") else base
    soft_y = base[-1] == "y" and base[-2] not in "aeou"
    past = given[0] if given else (base[:-1] + "ied" if soft_y else stem + "ed")
    done = given[1] if len(given) > 1 else past
    ing = given[2] if len(given) > 2 else (base if base.endswith("ee") else stem) + "ing"
    third = base[:-1] + "ies" if soft_y else base + ("es" if base.endswith(("sh", "ch", "ss", "x", "o")) else "s")
    return tuple(f"{form} {tail}".rstrip() for form in (base, third, past, done, ing))


def _concepts(table: str, verbs: bool = False) -> list[Concept]:
    entries = [entry.strip() for entry in table.split(",") if entry.strip()]
    return [
        tuple(_conjugate(word.strip()) if verbs else (word.strip(),) for word in entry.split("=")) for entry in entries
    ]


_POOL_SIZES = {
    "person": 1500, "company": 3000, "city": 800, "country": 60, "thing": 300, "noun": 3000, "team": 600,
    "title": 150, "amount": 900, "animal": 60, "dish": 60, "food": 60,
}  # fmt: skip
# How often a draw comes from the listed names rather than from the invented pool.
_LISTED_SHARE = {"person": 0.5, "company": 0.1, "city": 0.6, "country": 0.8}


@cache
def _invented_pools() -> dict[str, list[Concept]]:
    """Per kind, made-up names that share no word with each other, with the tables, or with any other kind."""
    rng = random.Random("names of the small world")  # fixed: the world is the same for every training seed
    tables = " ".join([*TABLES, *VERBS.values(), *WORDS.values(), *ENTITIES.values()])
    taken = {"huggingface", *re.findall(r"\w+", tables.lower())}
    pools: dict[str, list[Concept]] = {}
    for kind, size in _POOL_SIZES.items():
        pool = pools.setdefault(kind, [])
        while len(pool) < size:
            name = invented_name(kind, rng)
            # A name made of common words only (Bright Mind, The Silent River) counts as a whole.
            marks = set(name.lower().split()) - COMMON or {name.lower().replace(" ", "")}
            if taken.isdisjoint(marks):
                taken |= marks
                pool.append(((name,),))
    return pools


def _invented_pool(kind: str, split: Split) -> list[Concept]:
    pool = _invented_pools().get(kind, [])
    cut = len(pool) * 4 // 5
    return pool[:cut] if split == "train" else pool[cut:]


@cache
def _listed(kind: str, split: Split) -> tuple[Concept, ...]:
    if kind in VERBS:
        return tuple(_concepts(VERBS[kind], verbs=True))
    if kind in WORDS:
        return tuple(_concepts(WORDS[kind]))
    trained, _, held_out = ENTITIES[kind].partition("|")
    return tuple(_concepts(trained if split == "train" else held_out))


def draw(kind: str, split: Split, rng: random.Random) -> Concept:
    """A concept of ``kind`` (a key of VERBS, WORDS or ENTITIES) that sentences of ``split`` may use."""
    listed = _listed(kind, split)
    invented = _invented_pool(kind, split)
    use_listed = listed and (not invented or rng.random() < _LISTED_SHARE.get(kind, 0.75))
    return rng.choice(listed if use_listed else invented)


def entities(split: Split) -> frozenset[str]:
    """Every entity name, lower-cased, that sentences of ``split`` may contain."""
    concepts = (c for kind in ENTITIES for c in (*_listed(kind, split), *_invented_pool(kind, split)))
    return frozenset(form.lower() for concept in concepts for word in concept for form in word)


def listed_words(split: Split) -> list[str]:
    """Every word of the tables, in all its forms, that sentences of ``split`` may contain."""
    concepts = (concept for kind in [*VERBS, *WORDS, *ENTITIES] for concept in _listed(kind, split))
    return sorted({form for concept in concepts for word in concept for form in word})
