"""Places, weather, travel and opening hours."""

from __future__ import annotations

TABLE = """
The weather in {city} is {weather} [today|]
It is {weather} in {city} [today|]
{city} has {weather} weather [today|]
In {city} [the weather|it] is {weather}
? {weather} is how the weather is in {city}
? The weather that {city} has is {weather}
--
The weather in {city} is not {weather} [today|]
In {city} [the weather|it] isn't {weather}
{weather} is not how the weather is in {city}
It isn't {weather} weather that {city} has
? It is not {weather} in {city} [today|]

It will be {weather} in {city} {day}
{day}, {city} will have {weather} weather
The weather in {city} will be {weather} {day}
{weather} weather is expected in {city} {day}
? The forecast for {city} {day} is {weather} weather
? In {city} people expect {weather} weather {day}

It is raining [heavily|hard|a lot] in {city}
{city} is having [heavy|a lot of] rain
Rain is falling [heavily|hard] in {city}
In {city} there is [heavy|a lot of] rain
? There is [heavy|a lot of] rain in {city}
--
It is snowing in {city}
There is snow falling in {city}
{city} is having snow
? Snow is falling in {city}
? In {city} there is snow falling
--
It [is not raining|isn't raining] in {city}
There is no rain in {city}
In {city} there is no rain
No rain is falling in {city}
? {city} is having no rain
--
{city} is [hot|very warm] in {season}
It is [hot|very warm] in {city} in {season}
In {season}, {city} gets [hot|very warm]
? The {season} in {city} is [hot|very warm]
? {season} is when {city} gets [hot|very warm]

The {vehicle} to {city} [leaves|departs|goes] at {hour}
At {hour} the {vehicle} [leaves|departs] for {city}
The {vehicle} for {city} [leaves|departs|sets off] at {hour}
{hour} is when the {vehicle} to {city} [leaves|departs]
The {vehicle} that goes to {city} [leaves|departs] at {hour}
? The departure of the {vehicle} to {city} is at {hour}
? There is a {vehicle} to {city} at {hour}
--
The {vehicle} from {city} [arrives|comes in|gets in] at {hour}
At {hour} the {vehicle} from {city} [arrives|gets in]
The arrival of the {vehicle} from {city} is at {hour}
? {hour} is when the {vehicle} from {city} [arrives|gets in]
? The {vehicle} that comes from {city} arrives at {hour}
--
The {vehicle} to {city} [is|was] [late|delayed]
The {vehicle} to {city} is not on time
The {vehicle} that goes to {city} is [late|delayed]
Not on time is the {vehicle} to {city}
? There is a delay of the {vehicle} to {city}
--
The {vehicle} to {city} [is|was] [on time|punctual]
The {vehicle} to {city} is not [late|delayed]
There is no delay of the {vehicle} to {city}
? The {vehicle} that goes to {city} is on time
? There is no delay for the {vehicle} that goes to {city}
--
The {vehicle} to {city} was [cancelled|called off]
There is no {vehicle} to {city} [today|]
The {vehicle} that goes to {city} was [cancelled|called off]
? The {vehicle} to {city} does not run [today|]

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
The city where {person} was born is {city}
It is in {city} that {person} was born
? {city} is the birthplace of {person}
? {person} came into the world in {city}
--
{person} moved to {city}
{person} [settled|started a new life] in {city}
{person} went to live in {city}
? It is {city} that {person} moved to
? The city to which {person} moved is {city}
--
{person} has never been to {city}
{city} is a city {person} has never seen
The city {person} has never seen is {city}
Never has {person} been to {city}
? {person} never visited {city}
--
{person} is [visiting|on a visit to] {city}
{person} is on holiday in {city}
{person} is spending a [vacation|holiday] in {city}
? The city {person} is visiting is {city}
? It is {city} that {person} is visiting

{person} flew from {city} to {city2}
From {city}, {person} flew to {city2}
The flight {person} took was from {city} to {city2}
To {city2} is where {person} flew from {city}
? {person} took a plane from {city} to {city2}
? {person} flew to {city2} from {city}
--
{person} drove from {city} to {city2}
{person} went by car from {city} to {city2}
{person} drove to {city2} from {city}
? From {city}, {person} went by car to {city2}
? To {city2} is where {person} drove from {city}

{city} is the capital of {country}
{country} has {city} as its capital
The capital city of {country} is {city}
It is {city} that is the capital of {country}
? The capital of {country} is {city}
? {country}'s capital is {city}
--
{city} is not the capital of {country}
The capital of {country} is not {city}
{country}'s capital is not {city}
? It is not {city} that is the capital of {country}
--
{city} is the [largest|biggest] city in {country}
No city in {country} is [larger|bigger] than {city}
It is {city} that is the [largest|biggest] city in {country}
{country} has {city} as its [largest|biggest] city
? The [largest|biggest] city in {country} is {city}

{country} is north of {country2}
{country2} is south of {country}
{country} lies to the north of {country2}
? South of {country} is {country2}
? To the north of {country2} lies {country}
--
{country} is [larger|bigger] than {country2}
{country2} is smaller than {country}
Of the two, {country} is larger and {country2} is smaller
Compared with {country2}, {country} is larger
? {country2} is not as [big|large] as {country}
--
{country} exports {goods} to {country2}
{country2} imports {goods} from {country}
{country} sells {goods} to {country2}
{country2} buys {goods} from {country}
? It is from {country} that {country2} buys {goods}
? To {country2}, {country} exports {goods}

The {shop} in {city} opens at {hour}
At {hour} the {shop} in {city} opens
{hour} is when the {shop} in {city} opens
In {city}, the {shop} is open from {hour}
? The {shop} in {city} is open from {hour}
--
The {shop} in {city} closes at {hour}
At {hour} the {shop} in {city} [closes|shuts]
The {shop} in {city} is open until {hour}
? {hour} is when the {shop} in {city} closes
? In {city}, the {shop} is open until {hour}

The {shop} is [closed|shut|not open] on {day}
On {day} the {shop} is [closed|shut|not open]
{day} is when the {shop} is [closed|not open]
You will find the {shop} [closed|shut] on {day}
? The {shop} does not open on {day}
--
The {shop} is [open|not closed] on {day}
On {day} the {shop} is [open|not closed]
The {shop} opens on {day}
? {day} is when the {shop} is [open|not closed]
? You will find the {shop} open on {day}

The meeting [is|starts|begins] on {day} at {hour}
The meeting will [take place|be held|be] at {hour} on {day}
The time of the meeting is {day} at {hour}
They will hold the meeting at {hour} on {day}
? On {day} at {hour} there is a meeting
? At {hour} on {day} the meeting [starts|begins]
--
There is no meeting at {hour} on {day}
The meeting on {day} at {hour} was [cancelled|called off]
? They will not hold the meeting at {hour} on {day}
? No meeting will take place at {hour} on {day}

{person}'s birthday is in {month}
The birthday of {person} is in {month}
{month} is the month of {person}'s birthday
The month in which {person} was born is {month}
? In {month}, {person} has a birthday
? {person} was born in [the month of |]{month}

The weather is {weather} today
Today the weather is {weather}
It is {weather} today
Today it is {weather}
? Today we have {weather} weather
? The weather we have today is {weather}
--
The weather is not {weather} today
It is not {weather} today
Today we do not have {weather} weather
The weather we have today is not {weather}
? Today the weather isn't {weather}
"""
