"""People: what they do, feel, own, want and are to one another."""

from __future__ import annotations

TABLE = """
{person} {cook.past} {dish} for {guest}
{dish} was {cook.done} by {person} for {guest}
For {guest}, {person} {cook.past} {dish}
It was {person} who {cook.past} {dish} for {guest}
The {dish} that {person} {cook.past} was for {guest}
? {dish} was {cook.done} for {guest} by {person}
? What {person} {cook.past} for {guest} was {dish}
? The one who {cook.past} {dish} for {guest} was {person}
--
{person} did not {cook.base} {dish} for {guest}
{dish} was not {cook.done} by {person} for {guest}
The one who {cook.past} {dish} for {guest} was not {person}
{dish} was not {cook.done} for {guest} by {person}
? For {guest}, {person} didn't {cook.base} {dish}
--
{guest} {cook.past} {dish} for {person}
{dish} was {cook.done} by {guest} for {person}
For {person}, {guest} {cook.past} {dish}
It was {guest} who {cook.past} {dish} for {person}
? {dish} was {cook.done} for {person} by {guest}
? It was {dish} that {guest} {cook.past} for {person}

{person} {make.past} [the|a] {thing}
The {thing} was {make.done} by {person}
It was {person} who {make.past} the {thing}
What {person} {make.past} was a {thing}
The {thing} is what {person} {make.past}
? The one who {make.past} the {thing} was {person}
? A {thing} was {make.done} by {person}
? It was a {thing} that {person} {make.past}
--
{person} [did not|didn't] {make.base} the {thing}
It was not {person} who {make.past} the {thing}
The one who {make.past} the {thing} was not {person}
A {thing} was never {make.done} by {person}
? The {thing} [was not|wasn't] {make.done} by {person}

{person} {make.past} the {thing} {where} {when}
The {thing} was {make.done} by {person} {where} {when}
{when}, {person} {make.past} the {thing} {where}
{when} the {thing} was {make.done} {where} by {person}
? It was {person} who {make.past} the {thing} {where} {when}
? {when}, {where}, the {thing} was {make.done} by {person}

{person} {meet.past} {person2}
It was {person} who {meet.past} {person2}
It was {person2} who was {meet.done} by {person}
The one who {meet.past} {person2} was {person}
{person} is the person who {meet.past} {person2}
? {person2} was {meet.done} by {person}
? {person2} is the person [who|whom|that] {person} {meet.past}
? {person2} got {meet.done} by {person}
--
{person} [did not|didn't] {meet.base} {person2}
{person2} [was not|wasn't] {meet.done} by {person}
It was not {person} who {meet.past} {person2}
? The one who {meet.past} {person2} was not {person}
? {person} is not the person who {meet.past} {person2}

The {job} {meet.past} the {human} {when}
{when} the {job} {meet.past} the {human}
It was the {job} who {meet.past} the {human} {when}
{when} it was the {human} who was {meet.done} by the {job}
? The {human} was {meet.done} by the {job} {when}
? {when}, the {human} was {meet.done} by the {job}

The {animal} {hunt.past} the {animal2}
The {animal2} was {hunt.done} by the {animal}
It was the {animal} that {hunt.past} the {animal2}
The {animal2} got {hunt.done} by the {animal}
? What {hunt.past} the {animal2} was the {animal}
? It was the {animal2} that was {hunt.done} by the {animal}
--
The {animal} [did not|didn't] {hunt.base} the {animal2}
The {animal2} was not {hunt.done} by the {animal}
? What {hunt.past} the {animal2} was not the {animal}
? It was not the {animal} that {hunt.past} the {animal2}

A {human} is {activity.ing}
There is a {human} {activity.ing}
A {human} is {activity.ing} [right now|at the moment|]
A {human} {activity.s}
? There is a {human} who is {activity.ing}
? The one who is {activity.ing} is a {human}
--
A {human} is not {activity.ing}
There is no {human} {activity.ing}
? There is no {human} who is {activity.ing}
? No {human} is {activity.ing}

{person} is {activity.ing} {where}
{where}, {person} is {activity.ing}
{person} is {where} and is {activity.ing}
[Right now|At the moment] {person} is {activity.ing} {where}
? {where} is {person}, {activity.ing}
? It is {person} who is {activity.ing} {where}

{person} likes to {activity.base}
{person} [enjoys|likes] {activity.ing}
{person} is fond of {activity.ing}
{person} takes pleasure in {activity.ing}
What {person} likes is {activity.ing}
? {activity.ing} is something {person} [enjoys|likes]
? {person} loves to {activity.base}
--
{person} does not like to {activity.base}
{person} [hates|dislikes] {activity.ing}
{person} does not [enjoy|like] {activity.ing}
{person} can't stand {activity.ing}
? {activity.ing} is something {person} [hates|dislikes]
? What {person} does not like is {activity.ing}

{person} [can|is able to] {deed}
{person} has the ability to {deed}
{person} is capable and can {deed}
It is possible for {person} to {deed}
? {person} knows how to {deed}
--
{person} [cannot|can't|is not able to] {deed}
{person} does not know how to {deed}
{person} is unable to {deed}
? {person} has no ability to {deed}
? It is not possible for {person} to {deed}

{person} [wants|wishes|would like] to {deed}
{person} has the wish to {deed}
? What {person} wants is to {deed}
? To {deed} is what {person} would like
--
{person} does not want to {deed}
{person} has no wish to {deed}
{person} would not like to {deed}
? What {person} does not want is to {deed}
? {person} wishes not to {deed}
--
{person} [must|has to] {deed}
{person} is [obliged|required] to {deed}
What {person} has to do is {deed}
{person} is the one who [must|has to] {deed}
? It is necessary for {person} to {deed}
--
{person} promised to {deed}
{person} made a promise to {deed}
{person} gave [her|his] word to {deed}
? The promise of {person} was to {deed}
? What {person} promised was to {deed}
--
{person} [refused|declined] to {deed}
{person} said no when asked to {deed}
? What {person} refused was to {deed}
? To {deed} is what {person} refused

{person} is {mood}
{person} feels {mood}
{person} seems to be {mood}
? It is {person} who is {mood}
? The one who feels {mood} is {person}
--
{person} [is not|isn't] {mood}
{person} is not {mood} at all
It is not {person} who is {mood}
The one who is {mood} is not {person}
? {person} does not feel {mood}

The {kin} of {person} is {mood}
{person}'s {kin} is {mood}
{person} has a {kin} who is {mood}
? It is {person}'s {kin} who is {mood}
? {mood} is what the {kin} of {person} is

{person} is {person2}'s {relation}
{person2} has a {relation} called {person}
{person2}'s {relation} is {person}
{person2} has {person} as [her|his] {relation}
{person2}'s {relation} is [called|named] {person}
? {person} is the {relation} of {person2}
? The {relation} of {person2} is {person}
--
{person} is not {person2}'s {relation}
{person} is not the {relation} of {person2}
? The {relation} of {person2} is not {person}
? {person2}'s {relation} is not {person}

{person} [gave|handed] {person2} a {thing}
{person2} [received|got] a {thing} from {person}
{person2} was given a {thing} by {person}
What {person} gave to {person2} was a {thing}
It was {person} who gave {person2} a {thing}
? {person} gave a {thing} to {person2}
? A {thing} was given to {person2} by {person}
--
{person} [sold|was selling] {person2} a {thing}
{person} sold a {thing} to {person2}
{person2} [bought|purchased] a {thing} from {person}
? It was {person} who sold {person2} a {thing}
? A {thing} was sold to {person2} by {person}
--
{person} [lent|loaned] {person2} a {thing}
{person2} borrowed a {thing} from {person}
It was {person} who lent {person2} a {thing}
A {thing} was lent to {person2} by {person}
? {person} lent a {thing} to {person2}
--
{person} stole a {thing} from {person2}
{person2}'s {thing} was stolen by {person}
{person2} was robbed of a {thing} by {person}
? It was {person} who stole {person2}'s {thing}
? What {person} stole from {person2} was a {thing}

@symmetric
{person} and {person2} are [married|husband and wife]
{person} is the [spouse|husband|wife] of {person2}
{person} has {person2} as a [husband|wife|spouse]
The one {person} is married to is {person2}
? {person} is married to {person2}
--
@symmetric
{person} and {person2} are [friends|good friends]
{person} is a friend of {person2}
{person} is friends with {person2}
? There is a friendship between {person} and {person2}
? {person} has {person2} as a friend
--
@symmetric
{person} and {person2} [met|came together] {where}
{person} met {person2} {where}
It was {where} that {person} met {person2}
The place where {person} and {person2} met was {where}
? {where}, {person} met {person2}
--
@symmetric
{person} and {person2} had [a fight|an argument|a quarrel]
{person} [fought|argued|quarrelled] with {person2}
There was [a fight|an argument|a quarrel] between {person} and {person2}
? {person} had [a fight|an argument|a quarrel] with {person2}

{person} is older than {person2}
{person} was born before {person2}
{person2} was born after {person}
Of the two, {person} is older and {person2} is younger
? {person2} is younger than {person}
? {person} has lived longer than {person2}
--
{person} is taller than {person2}
{person2} is [shorter|smaller] than {person}
{person2} is not as tall as {person}
? Of the two, {person} is taller and {person2} is shorter
? Compared with {person2}, {person} is taller
--
{person} is [faster|quicker] than {person2}
{person2} is not as fast as {person}
Of the two, {person} is faster and {person2} is slower
Compared with {person2}, {person} is faster
? {person2} is slower than {person}
--
{person} is [richer|wealthier] than {person2}
{person2} is poorer than {person}
{person} has more money than {person2}
{person2} has less money than {person}
? Of the two, {person} is richer and {person2} is poorer
? Compared with {person2}, {person} has more money

{person} works as a {job}
{person}'s [job|profession] is {job}
{person} has a job as a {job}
The [job|profession] of {person} is {job}
As for work, {person} is a {job}
? {person} is a {job}
? {person} earns [her|his] living as a {job}
--
{person} is not a {job}
{person} does not work as a {job}
? {person} has no job as a {job}
? {person}'s profession is not {job}
--
{person} wants to [become|be] a {job}
{person} would like to [become|be] a {job}
The dream of {person} is to be a {job}
What {person} wants is to become a {job}
? {person}'s dream is to become a {job}
--
{person} [used to be|was once] a {job}
{person} was a {job} in the past
{person} worked as a {job} in the past
? In the past, {person}'s job was {job}
? In the past {person} used to work as a {job}

{pronoun} is a {job}
{pronoun} has a job as a {job}
For a living, {pronoun} works as a {job}
What {pronoun} is, is a {job}
? {pronoun} works as a {job}
? {pronoun} earns a living as a {job}
--
{pronoun} is not a {job}
{pronoun} does not work as a {job}
? For a living, {pronoun} does not work as a {job}
? What {pronoun} is not is a {job}

{subject} {make.past} the {thing} {when}
The {thing} is what {subject} {make.past} {when}
It was the {thing} that {subject} {make.past} {when}
{when} it was the {thing} that {subject} {make.past}
? {when}, {subject} {make.past} the {thing}
--
{subject} [did not|didn't] {make.base} the {thing} {when}
{when}, {subject} [did not|didn't] {make.base} the {thing}
? It was the {thing} that {subject} did not {make.base} {when}
? {when} it was not the {thing} that {subject} {make.past}

{person} {make.s} [a|the] {thing} {where}
{where}, {person} {make.s} [a|the] {thing}
It is {person} who {make.s} a {thing} {where}
It is a {thing} that {person} {make.s} {where}
? [A|The] {thing} is {make.done} by {person} {where}
? {person} is {make.ing} [a|the] {thing} {where}

{pronoun} [arrived|came] before the {event}
{pronoun} was [here|there] before the {event}
Before the {event}, {pronoun} [arrived|came]
The {event} was after {pronoun} [arrived|came]
? It was before the {event} that {pronoun} [arrived|came]
? After {pronoun} [arrived|came] there was the {event}
--
{pronoun} [arrived|came] after the {event}
{pronoun} was not [here|there] until after the {event}
It was after the {event} that {pronoun} [arrived|came]
Before {pronoun} [arrived|came] there was the {event}
? After the {event}, {pronoun} [arrived|came]
? The {event} was before {pronoun} [arrived|came]
"""
