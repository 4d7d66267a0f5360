"""Ways of saying things about companies, places, travel, weather, prices, sport and things (syntax: ``data.py``)."""

PLACES = """
[The company |The firm |]{company} is [based|headquartered|located|situated] in {city}
{company} has its [headquarters|main office|head office|main offices] in {city}
{company}'s [headquarters|head offices|main offices] are [situated|located|found|] in {city}
{company}'s [main office|head office] is [situated|located|] in {city}
The [headquarters|head offices] of [the company |]{company} are [located|situated|] in {city}
The [main office|head office] of [the company |]{company} is in {city}
The [company|firm] {company} has its seat in {city}
{city} is the home of [the company |]{company}
{company} runs its business from {city}
{company} is a {city} based [company|firm]
? {company} is a [company|firm] [based|headquartered] in {city}
? The city where {company} is [based|located] is {city}
? It is in {city} that {company} has its [main office|headquarters]
? {city} is where {company}'s [main office|head office] is situated
--
[The company |]{company} [is not|isn't] [based|headquartered|located] in {city}
{company} does not have its [headquarters|main office] in {city}
{company}'s headquarters are not [located|situated|] in {city}
The [main office|head office] of {company} is not in {city}
? It is not in {city} that {company} has its headquarters
? {city} is not where {company}'s main office is situated
--
{company} [left|moved out of|moved away from] {city}
{company} [moved|took] its headquarters away from {city}
{company} is no longer based in {city}
? {city} is no longer the home of {company}
? The headquarters of {company} are no longer in {city}
--
{company} sells {goods} in {city}
{goods} from {company} are sold in {city}
In {city}, {company} sells {goods}
? It is in {city} that {company} sells {goods}
? What {company} sells in {city} is {goods}

{person} founded [the company |]{company}
{company} was [founded|started|set up] by {person}
{person} is the founder of {company}
The founder of {company} is {person}
{person} [started|set up] [the company |]{company}
? It was {person} who founded the [company|firm] {company}
? The person who [started|set up] {company} is {person}
--
{person} [runs|leads|heads|manages] [the company |]{company}
{company} is [run|led|managed] by {person}
{person} is the [head|boss|chief] of {company}
The [head|boss|chief] of {company} is {person}
? It is {person} who [runs|leads] the company {company}
? The person who [runs|leads] {company} is {person}
--
{person} works for {company}
{person} has a job at {company}
{person} is employed by {company}
{company} employs {person}
? It is {company} that employs {person}
? The [company|firm] where {person} has a job is {company}
--
{person} [quit|left] [her|his] job at {company}
{person} no longer works for {company}
{person} resigned from {company}
? {company} no longer employs {person}
? The job at {company} was quit by {person}
--
{company} [fired|dismissed] {person}
{person} was [fired|dismissed] by {company}
{person} lost [her|his] job at {company}
? It was {company} that [fired|dismissed] {person}
? The company that [fired|dismissed] {person} was {company}

{company} [bought|acquired|took over] {company2}
{company2} was [bought|acquired|taken over] by {company}
{company2} now belongs to {company}
{company} is the new owner of {company2}
{company2} was sold to {company}
? The company that [bought|acquired] {company2} is {company}
? It is {company} that took over {company2}
--
{company} is [larger|bigger] than {company2}
{company2} is smaller than {company}
{company2} is not as [big|large] as {company}
? Of the two, {company} is larger and {company2} is smaller
? Compared with {company2}, {company} is larger
--
{company} [sued|took legal action against] {company2}
{company2} was sued by {company}
{company} took {company2} to court
? It is {company} that sued {company2}
? The company that sued {company2} is {company}

{company} [makes|produces|manufactures] {goods}
{goods} are [made|produced|manufactured] by {company}
{company} is a [maker|producer|manufacturer] of {goods}
The company {company} is in the business of making {goods}
? What {company} [makes|produces] is {goods}
? {goods} are what the company {company} [makes|produces]
--
{company} [stopped|no longer] [making|producing] {goods}
{goods} are no longer [made|produced] by {company}
{company} does not make {goods} any more
? What {company} no longer [makes|produces] is {goods}

[The company |]{company} [employs|has] {amount} people
{amount} people work for {company}
{company} has {amount} [employees|workers]
The number of [employees|workers] at {company} is {amount}
? There are {amount} people who work for {company}
? The [company|firm] has {amount} workers and is called {company}

{company}'s profits [rose|increased|grew|went up]
The profits of {company} [rose|increased|grew|went up]
There was [a rise|an increase] in the profits of {company}
{company} made more money than before
{company} became more profitable
? {company} saw its profits [grow|rise]
? The company {company} had higher profits than before
--
{company}'s profits [fell|dropped|decreased|went down]
The profits of {company} [fell|dropped|decreased|went down]
There was a [fall|drop|decrease] in the profits of {company}
{company} made less money than before
{company} became less profitable
? {company} saw its profits [fall|drop]
? The company {company} had lower profits than before
--
{company}'s profits [did not change|stayed the same]
There was no change in the profits of {company}
{company} made as much money as before
? {company} saw no change in its profits

The price of {dish} [rose|increased|went up|climbed]
{dish} became more expensive
{dish} got more expensive
There was [a rise|an increase] in the price of {dish}
{dish} costs more than before
? {dish} saw its price [rise|go up]
? People have to pay more for {dish} than before
--
The price of {dish} [fell|dropped|went down|decreased]
{dish} became [less expensive|cheaper]
{dish} got [less expensive|cheaper]
There was a [fall|drop] in the price of {dish}
{dish} costs less than before
? {dish} saw its price [fall|go down]
? People have to pay less for {dish} than before
--
The price of {dish} [did not change|stayed the same]
{dish} costs as much as before
? {dish} saw no change in its price
? People have to pay the same for {dish} as before

The {thing} costs [{amount} dollars|${amount}]
The price of the {thing} is [{amount} dollars|${amount}]
You [must|have to] pay {amount} dollars for the {thing}
The {thing} is sold for [{amount} dollars|${amount}]
{amount} dollars is the price of the {thing}
? For the {thing} you pay [{amount} dollars|${amount}]
? The {thing} has a price of [{amount} dollars|${amount}]
--
The {thing} does not cost {amount} dollars
The price of the {thing} is not {amount} dollars
? For the {thing} you do not pay {amount} dollars
? {amount} dollars is not the price of the {thing}

The {thing} costs {count} euros
The price of the {thing} is {count} euros
? For the {thing} you pay {count} euros
? The {thing} has a price of {count} euros

{person} paid {amount} dollars for the {thing}
{person} [bought|purchased] the {thing} for {amount} dollars
The {thing} cost {person} {amount} dollars
{person} spent {amount} dollars on the {thing}
? The sum {person} paid for the {thing} was {amount} dollars
? For {amount} dollars {person} bought the {thing}
--
{person} sold the {thing} for {amount} dollars
{person} got {amount} dollars for the {thing}
The {thing} was sold by {person} for {amount} dollars
? For {amount} dollars {person} sold the {thing}
? It was {person} who sold the {thing} for {amount} dollars

The weather in {city} is {weather} [today|]
It is {weather} in {city} [today|]
{city} has {weather} weather [today|]
In {city} [the weather|it] is {weather}
? {weather} is how the weather is in {city}
? The weather that {city} has is {weather}
--
The weather in {city} is not {weather} [today|]
It is not {weather} in {city} [today|]
In {city} [the weather|it] isn't {weather}
? {weather} is not how the weather is in {city}
? It isn't {weather} weather that {city} has

It will be {weather} in {city} {day}
{day}, {city} will have {weather} weather
The weather in {city} will be {weather} {day}
{weather} weather is expected in {city} {day}
? The forecast for {city} {day} is {weather} weather
? In {city} people expect {weather} weather {day}

It is raining [heavily|hard|a lot] in {city}
There is [heavy|a lot of] rain in {city}
{city} is having [heavy|a lot of] rain
? Rain is falling [heavily|hard] in {city}
? In {city} there is [heavy|a lot of] rain
--
It is snowing in {city}
There is snow falling in {city}
{city} is having snow
? Snow is falling in {city}
? In {city} there is snow falling
--
It [is not raining|isn't raining] in {city}
There is no rain in {city}
{city} is having no rain
? In {city} there is no rain
? No rain is falling in {city}
--
{city} is [hot|very warm] in {season}
It is [hot|very warm] in {city} in {season}
In {season}, {city} gets [hot|very warm]
? The {season} in {city} is [hot|very warm]
? {season} is when {city} gets [hot|very warm]

The {vehicle} to {city} [leaves|departs|goes] at {hour}
At {hour} the {vehicle} [leaves|departs] for {city}
The {vehicle} for {city} [leaves|departs|sets off] at {hour}
The departure of the {vehicle} to {city} is at {hour}
There is a {vehicle} to {city} at {hour}
? {hour} is when the {vehicle} to {city} [leaves|departs]
? The {vehicle} that goes to {city} [leaves|departs] at {hour}
--
The {vehicle} from {city} [arrives|comes in|gets in] at {hour}
At {hour} the {vehicle} from {city} [arrives|gets in]
The arrival of the {vehicle} from {city} is at {hour}
? {hour} is when the {vehicle} from {city} [arrives|gets in]
? The {vehicle} that comes from {city} arrives at {hour}
--
The {vehicle} to {city} [is|was] [late|delayed]
The {vehicle} to {city} is not on time
There is a delay of the {vehicle} to {city}
? The {vehicle} that goes to {city} is [late|delayed]
? Not on time is the {vehicle} to {city}
--
The {vehicle} to {city} [is|was] [on time|punctual]
The {vehicle} to {city} is not [late|delayed]
There is no delay of the {vehicle} to {city}
? The {vehicle} that goes to {city} is on time
? There is no delay for the {vehicle} that goes to {city}
--
The {vehicle} to {city} was [cancelled|called off]
There is no {vehicle} to {city} [today|]
The {vehicle} to {city} does not run [today|]
? The {vehicle} that goes to {city} was [cancelled|called off]

{person} [went|travelled|traveled] to {city} by {vehicle}
{person} took the {vehicle} to {city}
By {vehicle}, {person} [went|travelled] to {city}
{person} made the trip to {city} by {vehicle}
? The {vehicle} is what {person} took to {city}
? To get to {city}, {person} took the {vehicle}
--
{person} [came|travelled|returned] from {city} by {vehicle}
{person} took the {vehicle} from {city}
? To get away from {city}, {person} took the {vehicle}
? By {vehicle}, {person} came from {city}

{person} lives in {city}
{person} [has a home|resides] in {city}
{person}'s [home|house] is in {city}
The [home|house] of {person} is in {city}
{city} is where {person} lives
? The city where {person} lives is {city}
? It is in {city} that {person} has [her|his] home
--
{person} was born in {city}
{person}'s birthplace is {city}
{city} is the birthplace of {person}
{person} came into the world in {city}
? The city where {person} was born is {city}
? It is in {city} that {person} was born
--
{person} moved to {city}
{person} [settled|started a new life] in {city}
{person} went to live in {city}
? It is {city} that {person} moved to
? The city to which {person} moved is {city}
--
{person} has never been to {city}
{person} never visited {city}
{city} is a city {person} has never seen
? The city {person} has never seen is {city}
? Never has {person} been to {city}
--
{person} is [visiting|on a visit to] {city}
{person} is on holiday in {city}
{person} is spending a [vacation|holiday] in {city}
? The city {person} is visiting is {city}
? It is {city} that {person} is visiting

{person} flew from {city} to {city2}
{person} took a plane from {city} to {city2}
{person} flew to {city2} from {city}
From {city}, {person} flew to {city2}
? The flight {person} took was from {city} to {city2}
? To {city2} is where {person} flew from {city}
--
{person} drove from {city} to {city2}
{person} went by car from {city} to {city2}
{person} drove to {city2} from {city}
? From {city}, {person} went by car to {city2}
? To {city2} is where {person} drove from {city}

{city} is the capital of {country}
The capital of {country} is {city}
{country}'s capital is {city}
{country} has {city} as its capital
? The capital city of {country} is {city}
? It is {city} that is the capital of {country}
--
{city} is not the capital of {country}
The capital of {country} is not {city}
{country}'s capital is not {city}
? It is not {city} that is the capital of {country}
--
{city} is the [largest|biggest] city in {country}
The [largest|biggest] city in {country} is {city}
No city in {country} is [larger|bigger] than {city}
? It is {city} that is the [largest|biggest] city in {country}
? {country} has {city} as its [largest|biggest] city

{country} is north of {country2}
{country2} is south of {country}
{country} lies to the north of {country2}
? South of {country} is {country2}
? To the north of {country2} lies {country}
--
{country} is [larger|bigger] than {country2}
{country2} is smaller than {country}
{country2} is not as [big|large] as {country}
? Of the two, {country} is larger and {country2} is smaller
? Compared with {country2}, {country} is larger
--
{country} exports {goods} to {country2}
{country2} imports {goods} from {country}
{country} sells {goods} to {country2}
{country2} buys {goods} from {country}
? It is from {country} that {country2} buys {goods}
? To {country2}, {country} exports {goods}

{team} [beat|defeated] {team2}
{team2} lost to {team}
{team} won against {team2}
{team2} was [beaten|defeated] by {team}
{team} won the [game|match] against {team2}
? It was {team} who won against {team2}
? The [game|match] against {team} was lost by {team2}
--
{team} [drew|tied] with {team2}
{team} and {team2} [drew|tied]
The [game|match] between {team} and {team2} was a [draw|tie]
? It was a [draw|tie] between {team} and {team2}
? Neither {team} nor {team2} won the [game|match]

{person} plays {sport} [very well|well]
{person} is good at {sport}
{person} is a good {sport} player
{sport} is something {person} is good at
? {sport} is what {person} plays well
? As for {sport}, {person} plays very well
--
{person} plays {sport} [badly|very badly]
{person} is bad at {sport}
{person} is not good at {sport}
? {sport} is something {person} is not good at
? As for {sport}, {person} plays badly
--
{person} [gave up|stopped playing] {sport}
{person} does not play {sport} any more
{person} no longer plays {sport}
? {sport} is something {person} no longer plays
? {sport} is what {person} gave up

{person} [passed|did well in] the {subject} [exam|test]
The {subject} [exam|test] was passed by {person}
{person} was successful in the {subject} [exam|test]
? The exam that {person} passed was {subject}
? It was the {subject} test that {person} passed
--
{person} [failed|did not pass] the {subject} [exam|test]
The {subject} [exam|test] was failed by {person}
{person} was not successful in the {subject} [exam|test]
? The exam that {person} failed was {subject}
? It was the {subject} test that {person} failed
--
{person} teaches {subject}
{person} is a {subject} teacher
{person} gives {subject} lessons
? {subject} is what {person} teaches
? The teacher for {subject} is {person}
--
{person} [studies|is studying] {subject}
{person} is a {subject} student
{person} is a student of {subject}
? {subject} is what {person} studies

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
The [film|movie] {title} was to {person}'s taste
? What {person} liked was the [film|movie] {title}
? It was the movie {title} that {person} liked
--
{person} [disliked|hated] the [film|movie] {title}
{person} thought that {title} was a bad [film|movie]
{person} did not like the [film|movie] {title}
? What {person} disliked was the [film|movie] {title}
? It was the movie {title} that {person} did not like

The {thing} is {quality}
This is a {quality} {thing}
It is a {quality} {thing}
That {thing} is {quality}
? What we have here is a {quality} {thing}
? {quality} is what this {thing} is
--
The {thing} [is not|isn't] {quality}
This is not a {quality} {thing}
It isn't a {quality} {thing}
? {quality} is not what this {thing} is
? What we have here is not a {quality} {thing}

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
You cannot find the {thing} in the {room}
? It is not in the {room} that the {thing} is
? In the {room} there is no {thing}
--
{person} put the {thing} in the {room}
The {thing} was put in the {room} by {person}
{person} left the {thing} in the {room}
? It was {person} who put the {thing} in the {room}
? In the {room} is where {person} put the {thing}

The {thing} is [bigger|larger] than the {thing2}
The {thing2} is smaller than the {thing}
The {thing2} is not as [big|large] as the {thing}
? Of the two, the {thing} is larger and the {thing2} is smaller
? Compared with the {thing2}, the {thing} is larger
--
The {thing} is more expensive than the {thing2}
The {thing2} is cheaper than the {thing}
The {thing} costs more than the {thing2}
The {thing2} costs less than the {thing}
? Of the two, the {thing} is more expensive and the {thing2} is cheaper
? Compared with the {thing2}, the {thing} costs more
--
The {thing} is [on|on top of] the {thing2}
The {thing2} is under the {thing}
On the {thing2} there is a {thing}
? What is under the {thing} is the {thing2}
? The {thing2} has a {thing} on it

The {shop} in {city} opens at {hour}
At {hour} the {shop} in {city} opens
The {shop} in {city} is open from {hour}
? {hour} is when the {shop} in {city} opens
? In {city}, the {shop} is open from {hour}
--
The {shop} in {city} closes at {hour}
At {hour} the {shop} in {city} [closes|shuts]
The {shop} in {city} is open until {hour}
? {hour} is when the {shop} in {city} closes
? In {city}, the {shop} is open until {hour}

The {shop} is [closed|shut|not open] on {day}
On {day} the {shop} is [closed|shut|not open]
The {shop} does not open on {day}
? {day} is when the {shop} is [closed|not open]
? You will find the {shop} [closed|shut] on {day}
--
The {shop} is [open|not closed] on {day}
On {day} the {shop} is [open|not closed]
The {shop} opens on {day}
? {day} is when the {shop} is [open|not closed]
? You will find the {shop} open on {day}

The meeting [is|starts|begins] on {day} at {hour}
The meeting will [take place|be held|be] at {hour} on {day}
On {day} at {hour} there is a meeting
At {hour} on {day} the meeting [starts|begins]
? The time of the meeting is {day} at {hour}
? They will hold the meeting at {hour} on {day}
--
There is no meeting at {hour} on {day}
The meeting on {day} at {hour} was [cancelled|called off]
? They will not hold the meeting at {hour} on {day}
? No meeting will take place at {hour} on {day}

{person}'s birthday is in {month}
The birthday of {person} is in {month}
In {month}, {person} has a birthday
{person} was born in [the month of |]{month}
? {month} is the month of {person}'s birthday
? The month in which {person} was born is {month}

{person} [turned|switched] on the {thing}
The {thing} was [turned|switched] on by {person}
{person} [turned|switched] the {thing} on
? It was {person} who [turned|switched] on the {thing}
? What {person} [turned|switched] on was the {thing}
--
{person} [turned|switched] off the {thing}
The {thing} was [turned|switched] off by {person}
{person} [turned|switched] the {thing} off
? It was {person} who [turned|switched] off the {thing}
? What {person} [turned|switched] off was the {thing}

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

{sentence} because {sentence2}
Because {sentence2}, {sentence}
{sentence2}, so {sentence}
{sentence}, since {sentence2}
? Since {sentence2}, {sentence}
? {sentence2}, and because of this {sentence}

@symmetric
{sentence} and {sentence2}
{sentence}, and also {sentence2}
Both are true: {sentence}, and {sentence2}
? {sentence2} and, also, {sentence}
? It is true that {sentence} and that {sentence2}

{sentence} before {sentence2}
{sentence2} after {sentence}
First {sentence}, then {sentence2}
Before {sentence2}, {sentence}
? After {sentence}, {sentence2}
? {sentence}, and then {sentence2}

{person} [said|says] that {sentence}
According to {person}, {sentence}
{sentence}, [said|says] {person}
? {sentence}, according to {person}
? What {person} [said|says] is that {sentence}
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
"""
