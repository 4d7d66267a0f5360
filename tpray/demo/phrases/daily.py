"""Daily life: food, health, languages, questions, sport, school, books and films."""

from __future__ import annotations

TABLE = """
{person} [likes|loves|enjoys] {food}
{person} is fond of {food}
{food} are [liked|loved] by {person}
{food} are something {person} [likes|loves|enjoys]
? It is {food} that {person} [likes|loves]
? What {person} [likes|enjoys] is {food}
--
{person} [hates|dislikes] {food}
{person} can't stand {food}
It is {food} that {person} [hates|dislikes]
{food} are something {person} does not like
? {person} does not like {food}
--
{person} never eats {food}
{food} are never eaten by {person}
{person} eats no {food}
? What {person} never eats are {food}
? {food} are something {person} never eats
--
{person} is allergic to {food}
{food} make {person} [ill|sick]
An allergy to {food} is what {person} has
{person} gets [ill|sick] from eating {food}
? {person} has an allergy to {food}

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
It is good for your {organ} to eat {food}
[For|As for] the {organ}, {food} are [healthy|good]
? Your {organ} benefits when you eat {food}
? {food} are not bad for your {organ}

The {dish} [is|was] {taste}
The {dish} tastes {taste}
This {dish} is {taste}
? What {taste} {dish} this is
? It is {taste}, this {dish}
--
The {dish} is not {taste}
This {dish} isn't {taste}
It is not {taste}, this {dish}
What you can't call this {dish} is {taste}
? The {dish} does not taste {taste}

{person} [has|suffers from] a {illness}
{person} is [ill|sick] with a {illness}
{person} has got a {illness}
{person} is suffering from a {illness}
? A {illness} is what {person} has
? {person} is a patient who suffers from a {illness}
--
{person} [recovered from|got over] a {illness}
{person} is well again after a {illness}
After a {illness}, {person} is well again
The {illness} of {person} is over
? {person} no longer has a {illness}
--
{person} does not have a {illness}
{person} has no {illness}
? A {illness} is not what {person} has
? {person} isn't suffering from a {illness}

The {job} told {person} to [stop|give up] {activity.ing}
The {job} [said|advised] that {person} should [stop|quit] {activity.ing}
According to the {job}, {person} should stop {activity.ing}
{person}, said the {job}, should give up {activity.ing}
? {person} was told by the {job} to [stop|give up] {activity.ing}
--
The {job} told {person} to [start|begin] {activity.ing}
{person} was told by the {job} to [start|begin] {activity.ing}
The {job} [said|advised] that {person} should [start|begin] {activity.ing}
? According to the {job}, {person} should start {activity.ing}
? {person}, said the {job}, should begin {activity.ing}

{person} has {count} {animal}s
{count} {animal}s belong to {person}
{person} is the owner of {count} {animal}s
The number of {animal}s {person} has is {count}
? {person} [owns|keeps] {count} {animal}s
? There are {count} {animal}s that belong to {person}

{person} speaks {language} [very well|fluently|well]
{person} is fluent in {language}
{person} has a good knowledge of {language}
{person}'s {language} is [very good|excellent]
? {language} is a language {person} speaks [well|fluently]
? The {language} of {person} is [excellent|very good]
--
{person} speaks no {language}
{person} does not know {language}
{language} is a language {person} does not speak
{person} knows no {language}
? {person} does not speak {language}
--
{person} is learning {language}
{person} is taking {language} lessons
{person} studies {language}
? {language} is the language {person} is learning
? The lessons {person} is taking are {language} lessons

How can I learn {language}?
How do I learn {language} [quickly|fast|]?
What is a good way of learning {language}?
How does one learn {language}?
? What is the best way to learn {language}?
? What should I do to learn {language}?
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
In which shop can I [get|buy|find] a {thing}?
What is a good place to buy a {thing}?
Where do they sell a {thing}?
? Where is it possible to buy a {thing}?
--
How do I repair a {thing}?
What is the way to [repair|fix] a {thing}?
? What is a good way of repairing a {thing}?
? How can I fix a {thing}?

{team} [beat|defeated] {team2}
{team2} lost to {team}
{team} won against {team2}
It was {team} who won against {team2}
The [game|match] against {team} was lost by {team2}
? {team2} was [beaten|defeated] by {team}
? {team} won the [game|match] against {team2}
--
@symmetric
{team} [drew|tied] with {team2}
{team} and {team2} [drew|tied]
The [game|match] between {team} and {team2} was a [draw|tie]
? It was a [draw|tie] between {team} and {team2}
? Neither {team} nor {team2} won the [game|match]

{person} plays {sport} [very well|well]
{person} is good at {sport}
{sport} is what {person} plays well
As for {sport}, {person} plays very well
? {person} is a good {sport} player
? {sport} is something {person} is good at
--
{person} plays {sport} [badly|very badly]
{person} is bad at {sport}
{person} is not good at {sport}
? {sport} is something {person} is not good at
? As for {sport}, {person} plays badly
--
{person} [gave up|stopped playing] {sport}
{person} does not play {sport} any more
{sport} is something {person} no longer plays
{sport} is what {person} gave up
? {person} no longer plays {sport}

{person} [passed|did well in] the {subject} [exam|test]
The {subject} [exam|test] was passed by {person}
{person} was successful in the {subject} [exam|test]
? The exam that {person} passed was {subject}
? It was the {subject} test that {person} passed
--
{person} [failed|did not pass] the {subject} [exam|test]
The {subject} [exam|test] was failed by {person}
The exam that {person} failed was {subject}
It was the {subject} test that {person} failed
? {person} was not successful in the {subject} [exam|test]
--
{person} teaches {subject}
{person} is a {subject} teacher
{person} gives {subject} lessons
? {subject} is what {person} teaches
? The teacher for {subject} is {person}
--
{person} [studies|is studying] {subject}
{person} is a {subject} student
{subject} is what {person} studies
? {person} is a student of {subject}

{person} {write.past} the book {title}
The book {title} was {write.done} by {person}
It was {person} who {write.past} {title}
{title} is a book that {person} {write.past}
? The one who {write.past} the book {title} was {person}
? {title} is a book {write.done} by {person}
--
{person} did not {write.base} the book {title}
The book {title} was not {write.done} by {person}
? The one who {write.past} {title} was not {person}

{person} [directed|made] the [film|movie] {title}
The [film|movie] {title} was [directed|made] by {person}
{person} is the director of {title}
{title} is a [film|movie] by {person}
? It was {person} who made the [film|movie] {title}
? The director of the [film|movie] {title} is {person}
--
{person} [liked|enjoyed] the [film|movie] {title}
{person} thought that {title} was a good [film|movie]
What {person} liked was the [film|movie] {title}
It was the movie {title} that {person} liked
? The [film|movie] {title} was to {person}'s taste
--
{person} [disliked|hated] the [film|movie] {title}
{person} thought that {title} was a bad [film|movie]
{person} did not like the [film|movie] {title}
? What {person} disliked was the [film|movie] {title}
? It was the movie {title} that {person} did not like

{speaker} [like|love|enjoy] {dish}
{dish} is something {speaker} [like|love|enjoy]
What {speaker} [like|enjoy] is {dish}
It is {dish} that {speaker} [like|love]
? {speaker} really [like|love|enjoy] {dish}
--
{speaker} [hate|dislike] {dish}
{speaker} [do not|don't] [like|enjoy] {dish}
{speaker} [cannot|can't] stand {dish}
? What {speaker} hate is {dish}
? It is {dish} that {speaker} [hate|do not like]
--
{speaker} never [eat|have] {dish}
{dish} is something {speaker} never [eat|have]
? It is {dish} that {speaker} never eat
? {dish} is never what {speaker} eat

{activity.ing} is [especially |really |very |so |][bad|harmful|unhealthy] for [your|the] {organ}
{activity.ing} [harms|damages|hurts] [your|the] {organ}
It [harms|damages] your {organ} to {activity.base}
Your {organ} suffers when you {activity.base}
{activity.ing} is not good for your {organ}
? It is bad for your {organ} to {activity.base}
? [For|As for] the {organ}, {activity.ing} is [harmful|bad]
--
{activity.ing} is [especially |really |very |so |][good|healthy|beneficial] for [your|the] {organ}
Your {organ} benefits when you {activity.base}
It is good for your {organ} to {activity.base}
[For|As for] the {organ}, {activity.ing} is [healthy|good]
? {activity.ing} helps [your|the] {organ}
? {activity.ing} is not bad for your {organ}

The {work} [was|is] [very |really |]{quality}
I think [that |]the {work} [was|is] {quality}
It was a {quality} {work}
That was a [very |really |]{quality} {work}
We found the {work} {quality}
? In my view the {work} was {quality}
? What a {quality} {work} that was
--
The {work} [was not|wasn't] {quality}
It was not a {quality} {work}
In my view the {work} was not {quality}
That was not a {quality} {work}
? I do not think [that |]the {work} was {quality}
"""
