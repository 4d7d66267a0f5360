"""Companies and prices."""

from __future__ import annotations

TABLE = """
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
The [head|boss|chief] of {company} is {person}
It is {person} who [runs|leads] the company {company}
The person who [runs|leads] {company} is {person}
? {company} is [run|led|managed] by {person}
? {person} is the [head|boss|chief] of {company}
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
{company} no longer employs {person}
The job at {company} was quit by {person}
? {person} resigned from {company}
--
{company} [fired|dismissed] {person}
{person} was [fired|dismissed] by {company}
{person} lost [her|his] job at {company}
? It was {company} that [fired|dismissed] {person}
? The company that [fired|dismissed] {person} was {company}

{company} [bought|acquired|took over] {company2}
{company2} was [bought|acquired|taken over] by {company}
{company2} now belongs to {company}
The company that [bought|acquired] {company2} is {company}
It is {company} that took over {company2}
? {company} is the new owner of {company2}
? {company2} was sold to {company}
--
{company} is [larger|bigger] than {company2}
{company2} is smaller than {company}
{company2} is not as [big|large] as {company}
? Of the two, {company} is larger and {company2} is smaller
? Compared with {company2}, {company} is larger
--
{company} [sued|took legal action against] {company2}
{company2} was sued by {company}
It is {company} that sued {company2}
The company that sued {company2} is {company}
? {company} took {company2} to court

{company} [makes|produces|manufactures] {goods}
{goods} are [made|produced|manufactured] by {company}
{company} is a [maker|producer|manufacturer] of {goods}
The company {company} is in the business of making {goods}
? What {company} [makes|produces] is {goods}
? {goods} are what the company {company} [makes|produces]
--
{company} [stopped|no longer] [making|producing] {goods}
{goods} are no longer [made|produced] by {company}
What {company} no longer [makes|produces] is {goods}
? {company} does not make {goods} any more

[The company |]{company} [employs|has] {amount} people
{amount} people work for {company}
{company} has {amount} [employees|workers]
The number of [employees|workers] at {company} is {amount}
? There are {amount} people who work for {company}
? The [company|firm] has {amount} workers and is called {company}

{company}'s profits [rose|increased|grew|went up]
There was [a rise|an increase] in the profits of {company}
{company} made more money than before
{company} saw its profits [grow|rise]
The company {company} had higher profits than before
? The profits of {company} [rose|increased|grew|went up]
? {company} became more profitable
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
{company} saw no change in its profits
? {company} made as much money as before

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
There was a [fall|drop] in the price of {dish}
{dish} saw its price [fall|go down]
People have to pay less for {dish} than before
? {dish} got [less expensive|cheaper]
? {dish} costs less than before
--
The price of {dish} [did not change|stayed the same]
{dish} costs as much as before
? {dish} saw no change in its price
? People have to pay the same for {dish} as before

The {thing} costs [{amount} dollars|${amount}]
The price of the {thing} is [{amount} dollars|${amount}]
The {thing} is sold for [{amount} dollars|${amount}]
For the {thing} you pay [{amount} dollars|${amount}]
The {thing} has a price of [{amount} dollars|${amount}]
? You [must|have to] pay {amount} dollars for the {thing}
? {amount} dollars is the price of the {thing}
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
For {amount} dollars {person} sold the {thing}
It was {person} who sold the {thing} for {amount} dollars
? The {thing} was sold by {person} for {amount} dollars
"""
