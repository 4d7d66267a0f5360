"""Ways of saying things about people, food, health and daily life (the syntax is explained in ``data.py``)."""

PEOPLE = """
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
For {guest}, {person} didn't {cook.base} {dish}
? The one who {cook.past} {dish} for {guest} was not {person}
? {dish} was not {cook.done} for {guest} by {person}

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
The {thing} [was not|wasn't] {make.done} by {person}
It was not {person} who {make.past} the {thing}
? The one who {make.past} the {thing} was not {person}
? A {thing} was never {make.done} by {person}

{person} {make.past} the {thing} {where} {when}
The {thing} was {make.done} by {person} {where} {when}
{when}, {person} {make.past} the {thing} {where}
{when} the {thing} was {make.done} {where} by {person}
? It was {person} who {make.past} the {thing} {where} {when}
? {when}, {where}, the {thing} was {make.done} by {person}

{person} {meet.past} {person2}
{person2} was {meet.done} by {person}
It was {person} who {meet.past} {person2}
{person2} is the person [who|whom|that] {person} {meet.past}
{person2} got {meet.done} by {person}
? It was {person2} who was {meet.done} by {person}
? The one who {meet.past} {person2} was {person}
? {person} is the person who {meet.past} {person2}
--
{person} [did not|didn't] {meet.base} {person2}
{person2} [was not|wasn't] {meet.done} by {person}
It was not {person} who {meet.past} {person2}
? The one who {meet.past} {person2} was not {person}
? {person} is not the person who {meet.past} {person2}

The {job} {meet.past} the {human} {when}
The {human} was {meet.done} by the {job} {when}
{when} the {job} {meet.past} the {human}
{when}, the {human} was {meet.done} by the {job}
? It was the {job} who {meet.past} the {human} {when}
? {when} it was the {human} who was {meet.done} by the {job}

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
{activity.ing} is something {person} [enjoys|likes]
{person} loves to {activity.base}
? {person} takes pleasure in {activity.ing}
? What {person} likes is {activity.ing}
--
{person} does not like to {activity.base}
{person} [hates|dislikes] {activity.ing}
{person} does not [enjoy|like] {activity.ing}
{person} can't stand {activity.ing}
? {activity.ing} is something {person} [hates|dislikes]
? What {person} does not like is {activity.ing}

{person} [can|is able to] {deed}
{person} knows how to {deed}
{person} has the ability to {deed}
? {person} is capable and can {deed}
? It is possible for {person} to {deed}
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
It is necessary for {person} to {deed}
{person} is [obliged|required] to {deed}
? What {person} has to do is {deed}
? {person} is the one who [must|has to] {deed}
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
{person} does not feel {mood}
{person} is not {mood} at all
? It is not {person} who is {mood}
? The one who is {mood} is not {person}

The {relation} of {person} is {mood}
{person}'s {relation} is {mood}
{person} has a {relation} who is {mood}
? It is {person}'s {relation} who is {mood}
? {mood} is what the {relation} of {person} is

{person} is {person2}'s {relation}
{person} is the {relation} of {person2}
The {relation} of {person2} is {person}
{person2} has a {relation} called {person}
{person2}'s {relation} is {person}
? {person2} has {person} as [her|his] {relation}
? {person2}'s {relation} is [called|named] {person}
--
{person} is not {person2}'s {relation}
{person} is not the {relation} of {person2}
? The {relation} of {person2} is not {person}
? {person2}'s {relation} is not {person}

{person} [gave|handed] {person2} a {thing}
{person} gave a {thing} to {person2}
{person2} [received|got] a {thing} from {person}
{person2} was given a {thing} by {person}
A {thing} was given to {person2} by {person}
? What {person} gave to {person2} was a {thing}
? It was {person} who gave {person2} a {thing}
--
{person} [sold|was selling] {person2} a {thing}
{person} sold a {thing} to {person2}
{person2} [bought|purchased] a {thing} from {person}
? It was {person} who sold {person2} a {thing}
? A {thing} was sold to {person2} by {person}
--
{person} [lent|loaned] {person2} a {thing}
{person} lent a {thing} to {person2}
{person2} borrowed a {thing} from {person}
? It was {person} who lent {person2} a {thing}
? A {thing} was lent to {person2} by {person}
--
{person} stole a {thing} from {person2}
{person2}'s {thing} was stolen by {person}
{person2} was robbed of a {thing} by {person}
? It was {person} who stole {person2}'s {thing}
? What {person} stole from {person2} was a {thing}

@symmetric
{person} and {person2} are [married|husband and wife]
{person} is married to {person2}
{person} is the [spouse|husband|wife] of {person2}
? {person} has {person2} as a [husband|wife|spouse]
? The one {person} is married to is {person2}
--
{person} and {person2} are [friends|good friends]
{person} is a friend of {person2}
{person} is friends with {person2}
? There is a friendship between {person} and {person2}
? {person} has {person2} as a friend
--
{person} and {person2} [met|came together] {where}
{person} met {person2} {where}
{where}, {person} met {person2}
? It was {where} that {person} met {person2}
? The place where {person} and {person2} met was {where}
--
{person} and {person2} had [a fight|an argument|a quarrel]
{person} [fought|argued|quarrelled] with {person2}
There was [a fight|an argument|a quarrel] between {person} and {person2}
? {person} had [a fight|an argument|a quarrel] with {person2}

{person} is older than {person2}
{person2} is younger than {person}
{person} was born before {person2}
{person} has lived longer than {person2}
? {person2} was born after {person}
? Of the two, {person} is older and {person2} is younger
--
{person} is taller than {person2}
{person2} is [shorter|smaller] than {person}
{person2} is not as tall as {person}
? Of the two, {person} is taller and {person2} is shorter
? Compared with {person2}, {person} is taller
--
{person} is [faster|quicker] than {person2}
{person2} is slower than {person}
{person2} is not as fast as {person}
? Of the two, {person} is faster and {person2} is slower
? Compared with {person2}, {person} is faster
--
{person} is [richer|wealthier] than {person2}
{person2} is poorer than {person}
{person} has more money than {person2}
{person2} has less money than {person}
? Of the two, {person} is richer and {person2} is poorer
? Compared with {person2}, {person} has more money

{person} works as a {job}
{person} is a {job}
{person}'s [job|profession] is {job}
{person} earns [her|his] living as a {job}
{person} has a job as a {job}
? The [job|profession] of {person} is {job}
? As for work, {person} is a {job}
--
{person} is not a {job}
{person} does not work as a {job}
? {person} has no job as a {job}
? {person}'s profession is not {job}
--
{person} wants to [become|be] a {job}
{person} would like to [become|be] a {job}
{person}'s dream is to become a {job}
? The dream of {person} is to be a {job}
? What {person} wants is to become a {job}
--
{person} [used to be|was once] a {job}
{person} was a {job} in the past
{person} worked as a {job} in the past
? In the past, {person}'s job was {job}
? In the past {person} used to work as a {job}

{person} [likes|loves|enjoys] {food}
{person} is fond of {food}
{food} are [liked|loved] by {person}
{food} are something {person} [likes|loves|enjoys]
? It is {food} that {person} [likes|loves]
? What {person} [likes|enjoys] is {food}
--
{person} [hates|dislikes] {food}
{person} does not like {food}
{person} can't stand {food}
? It is {food} that {person} [hates|dislikes]
? {food} are something {person} does not like
--
{person} never eats {food}
{food} are never eaten by {person}
{person} eats no {food}
? What {person} never eats are {food}
? {food} are something {person} never eats
--
{person} is allergic to {food}
{person} has an allergy to {food}
{food} make {person} [ill|sick]
? An allergy to {food} is what {person} has
? {person} gets [ill|sick] from eating {food}

{food} are [especially |really |very |so |][bad|harmful|unhealthy] for [your|the] {organ}
{food} [harm|damage|hurt] [your|the] {organ}
Eating {food} is bad for [your|the] {organ}
Your {organ} suffers when you eat {food}
Eating {food} is not good for your {organ}
? It is bad for your {organ} to eat {food}
? [For|As for] the {organ}, {food} are [harmful|bad]
--
{food} are [especially |really |very |so |][good|healthy|beneficial] for [your|the] {organ}
{food} help [your|the] {organ}
Eating {food} is good for [your|the] {organ}
Your {organ} benefits when you eat {food}
{food} are not bad for your {organ}
? It is good for your {organ} to eat {food}
? [For|As for] the {organ}, {food} are [healthy|good]

The {dish} [is|was] {taste}
The {dish} tastes {taste}
This {dish} is {taste}
? What {taste} {dish} this is
? It is {taste}, this {dish}
--
The {dish} is not {taste}
The {dish} does not taste {taste}
This {dish} isn't {taste}
? It is not {taste}, this {dish}
? What you can't call this {dish} is {taste}

{person} [has|suffers from] a {illness}
{person} is [ill|sick] with a {illness}
{person} has got a {illness}
{person} is suffering from a {illness}
? A {illness} is what {person} has
? {person} is a patient who suffers from a {illness}
--
{person} [recovered from|got over] a {illness}
{person} no longer has a {illness}
{person} is well again after a {illness}
? After a {illness}, {person} is well again
? The {illness} of {person} is over
--
{person} does not have a {illness}
{person} has no {illness}
? A {illness} is not what {person} has
? {person} isn't suffering from a {illness}

The {job} told {person} to [stop|give up] {activity.ing}
{person} was told by the {job} to [stop|give up] {activity.ing}
The {job} [said|advised] that {person} should [stop|quit] {activity.ing}
? According to the {job}, {person} should stop {activity.ing}
? {person}, said the {job}, should give up {activity.ing}
--
The {job} told {person} to [start|begin] {activity.ing}
{person} was told by the {job} to [start|begin] {activity.ing}
The {job} [said|advised] that {person} should [start|begin] {activity.ing}
? According to the {job}, {person} should start {activity.ing}
? {person}, said the {job}, should begin {activity.ing}

{person} has {count} {animal}s
{person} [owns|keeps] {count} {animal}s
There are {count} {animal}s that belong to {person}
{count} {animal}s belong to {person}
? {person} is the owner of {count} {animal}s
? The number of {animal}s {person} has is {count}

{person} speaks {language} [very well|fluently|well]
{person} is fluent in {language}
{person} has a good knowledge of {language}
{person}'s {language} is [very good|excellent]
? {language} is a language {person} speaks [well|fluently]
? The {language} of {person} is [excellent|very good]
--
{person} speaks no {language}
{person} does not speak {language}
{person} does not know {language}
? {language} is a language {person} does not speak
? {person} knows no {language}
--
{person} is learning {language}
{person} is taking {language} lessons
{person} studies {language}
? {language} is the language {person} is learning
? The lessons {person} is taking are {language} lessons

How can I learn {language}?
What is the best way to learn {language}?
How do I learn {language} [quickly|fast|]?
What should I do to learn {language}?
? What is a good way of learning {language}?
? How does one learn {language}?
--
How can I teach {language}?
What is the best way to teach {language}?
? What is a good way of teaching {language}?
? How does one teach {language}?
--
Why [should I|do people] learn {language}?
What are the reasons to learn {language}?
? What is the reason for learning {language}?
? For what reason do people learn {language}?

How much does [a|the] {thing} cost?
What is the price of [a|the] {thing}?
How expensive is [a|the] {thing}?
? What does [a|the] {thing} cost?
? At what price can I buy a {thing}?
--
Where can I buy a {thing}?
Where is it possible to buy a {thing}?
In which shop can I [get|buy|find] a {thing}?
? What is a good place to buy a {thing}?
? Where do they sell a {thing}?
--
How do I repair a {thing}?
What is the way to [repair|fix] a {thing}?
? What is a good way of repairing a {thing}?
? How can I fix a {thing}?
"""
