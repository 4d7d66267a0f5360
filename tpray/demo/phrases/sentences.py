"""Sentences made of sentences."""

from __future__ import annotations

TABLE = """
{sentence} because {sentence2}
{sentence2}, so {sentence}
Since {sentence2}, {sentence}
{sentence2}, and because of this {sentence}
? Because {sentence2}, {sentence}
? {sentence}, since {sentence2}
--
{sentence} before {sentence2}
{sentence2} after {sentence}
First {sentence}, then {sentence2}
Before {sentence2}, {sentence}
? After {sentence}, {sentence2}
? {sentence}, and then {sentence2}

{person} [said|says] that {sentence}
According to {person}, {sentence}
{sentence}, according to {person}
What {person} [said|says] is that {sentence}
? {sentence}, [said|says] {person}
--
{person} [doubts|does not believe] that {sentence}
{person} is not sure that {sentence}
? In the view of {person} it is not true that {sentence}
? What {person} [doubts|does not believe] is that {sentence}

[It is true that |I know that |]{sentence}
{sentence}, [it is true|as everyone knows]
? It is a fact that {sentence}
? As everyone knows, {sentence}
--
It is not true that {sentence}
It is false that {sentence}
{sentence} is not true
? It is not a fact that {sentence}
? That {sentence} is false

@symmetric
{sentence} and {sentence2}
Both are true: {sentence}, and {sentence2}
{sentence2} and, also, {sentence}
It is true that {sentence} and that {sentence2}
? {sentence}, and also {sentence2}
"""
