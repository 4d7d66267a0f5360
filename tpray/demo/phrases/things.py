"""Things, where they are and how they compare; and invented nouns, to be compared piece by piece."""

from __future__ import annotations

TABLE = """
The {thing} is {quality}
This is a {quality} {thing}
It is a {quality} {thing}
That {thing} is {quality}
? What we have here is a {quality} {thing}
? {quality} is what this {thing} is
--
The {thing} [is not|isn't] {quality}
This is not a {quality} {thing}
{quality} is not what this {thing} is
What we have here is not a {quality} {thing}
? It isn't a {quality} {thing}

{person}'s {thing} is {colour}
{person} has a {colour} {thing}
The {thing} of {person} is {colour}
The {thing} that belongs to {person} is {colour}
The {colour} {thing} belongs to {person}
? The colour of {person}'s {thing} is {colour}
? {person} is the owner of a {colour} {thing}
--
{person}'s {thing} is not {colour}
The {thing} of {person} is not {colour}
? The colour of {person}'s {thing} is not {colour}
? The {thing} that belongs to {person} isn't {colour}

The {thing} is in the {room}
There is a {thing} in the {room}
In the {room} there is a {thing}
You can find the {thing} in the {room}
The {room} has a {thing} in it
? It is in the {room} that the {thing} is
? The place of the {thing} is the {room}
--
The {thing} is not in the {room}
There is no {thing} in the {room}
It is not in the {room} that the {thing} is
In the {room} there is no {thing}
? You cannot find the {thing} in the {room}
--
{person} put the {thing} in the {room}
The {thing} was put in the {room} by {person}
{person} left the {thing} in the {room}
? It was {person} who put the {thing} in the {room}
? In the {room} is where {person} put the {thing}

The {thing} is [bigger|larger] than the {thing2}
The {thing2} is not as [big|large] as the {thing}
Of the two, the {thing} is larger and the {thing2} is smaller
Compared with the {thing2}, the {thing} is larger
? The {thing2} is smaller than the {thing}
--
The {thing} is more expensive than the {thing2}
The {thing2} is cheaper than the {thing}
The {thing} costs more than the {thing2}
The {thing2} costs less than the {thing}
? Of the two, the {thing} is more expensive and the {thing2} is cheaper
? Compared with the {thing2}, the {thing} costs more
--
The {thing} is [on|on top of] the {thing2}
On the {thing2} there is a {thing}
What is under the {thing} is the {thing2}
The {thing2} has a {thing} on it
? The {thing2} is under the {thing}

{person} [turned|switched] on the {thing}
The {thing} was [turned|switched] on by {person}
{person} [turned|switched] the {thing} on
? It was {person} who [turned|switched] on the {thing}
? What {person} [turned|switched] on was the {thing}
--
{person} [turned|switched] off the {thing}
The {thing} was [turned|switched] off by {person}
It was {person} who [turned|switched] off the {thing}
What {person} [turned|switched] off was the {thing}
? {person} [turned|switched] the {thing} off

The {noun} {make.past} the {noun2}
The {noun2} was {make.done} by the {noun}
It was the {noun} that {make.past} the {noun2}
? What {make.past} the {noun2} was the {noun}
? It was the {noun2} that was {make.done} by the {noun}

The {noun} {noun2} the {noun3} in the {noun4}
In the {noun4}, the {noun} {noun2} the {noun3}
? It is in the {noun4} that the {noun} {noun2} the {noun3}
? The {noun}, in the {noun4}, {noun2} the {noun3}

A {quality} {noun} is {noun2} the {quality2} {noun3}
The {quality2} {noun3} is {noun2} by a {quality} {noun}
There is a {quality} {noun} {noun2} the {quality2} {noun3}
? It is a {quality} {noun} that is {noun2} the {quality2} {noun3}
"""
