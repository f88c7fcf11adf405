"""Jobs that take facts out of a text: contacts to JSON, dates to ISO 8601, questions to SQL."""

import json
from random import Random

from examples.jobs.words import CITIES, COMPANIES, FIRST_NAMES, LAST_NAMES, Example, either, phone

_INTRODUCTIONS = (
    "Hi, I'm {name} from {company}.",
    "This is {name}, I work at {company}.",
    "{name} here ({company}).",
    "My name is {name} and I represent {company}.",
)
_REACH = (
    "You can reach me at {email}.",
    "Write to {email} any time.",
    "My mail is {email}.",
    "Best contact: {email}.",
)
_CALL = ("", "", "Or call {phone}.", "My number is {phone}.", "Phone: {phone}.")

_MONTHS = either(
    "January|February|March|April|May|June|July|August|September|October|November|December"
)
_EVENTS = either(
    "The lease begins on {date}.|Our flight leaves on {date}.|She was born on {date}.|"
    "The invoice is due on {date}.|Please renew it before {date}.|"
    "The exam takes place on {date}.|They met on {date} at the station.|"
    "The offer ends on {date}, so be quick.|Delivery is planned for {date}.|"
    "{date} is the day of the launch."
)

_TABLES = {
    "orders": (("city", "status"), ("amount", "year")),
    "employees": (("city", "team"), ("salary", "age")),
    "products": (("color", "brand"), ("price", "weight")),
    "flights": (("origin", "airline"), ("distance", "delay")),
}
_VALUES = {
    "city": tuple(CITIES),
    "origin": tuple(CITIES),
    "brand": tuple(COMPANIES),
    "airline": tuple(COMPANIES),
    "status": ("open", "paid", "shipped", "cancelled"),
    "team": ("sales", "support", "design", "finance"),
    "color": ("red", "green", "blue", "black", "white"),
}
_AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}
_COMPARISONS = {"above": ">", "below": "<", "of exactly": "=", "of at least": ">="}


def contact(rng: Random) -> Example:
    first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    company = f"{rng.choice(COMPANIES)} {rng.choice(('Ltd', 'GmbH', 'Inc', 'Labs'))}"
    user = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{first}_{last}")).lower()
    domain = company.split(maxsplit=1)[0].lower() + rng.choice((".com", ".org", ".io"))
    call = rng.choice(_CALL)
    facts = {
        "name": f"{first} {last}",
        "company": company,
        "email": f"{user}@{domain}",
        "phone": phone(rng) if call else None,
    }
    parts = (rng.choice(_INTRODUCTIONS), rng.choice(_REACH), call)
    text = " ".join(part.format(**facts) for part in parts if part)
    return Example(text, json.dumps(facts))


def iso_date(rng: Random) -> Example:
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    name = _MONTHS[month - 1]
    written = rng.choice(
        (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"{day} {name[:3]} {year}",
            f"the {day}{_ordinal(day)} of {name} {year}",
            f"{name} {day}{_ordinal(day)}, {year}",
            f"{day:02}.{month:02}.{year}",
        )
    )
    return Example(rng.choice(_EVENTS).format(date=written), f"{year}-{month:02}-{day:02}")


def sql(rng: Random) -> Example:
    table = rng.choice(sorted(_TABLES))
    texts, numbers = _TABLES[table]
    text, number = rng.choice(texts), rng.choice(numbers)
    value = rng.choice(_VALUES[text])
    where = f" WHERE {text} = '{value}'"
    which = f"{table} with {text} {value}"
    if rng.random() < 0.5:
        words, sign = rng.choice(sorted(_COMPARISONS.items()))
        limit = rng.randint(2, 99) * 10
        where += f" AND {number} {sign} {limit}"
        which += f" and {number} {words} {limit}"
    kind = rng.choice(("count", "list", "aggregate"))
    if kind == "count":
        return Example(f"How many {which} are there?", f"SELECT COUNT(*) FROM {table}{where};")
    if kind == "list":
        return Example(f"Show all {which}.", f"SELECT * FROM {table}{where};")
    target = rng.choice(numbers)
    word, function = rng.choice(sorted(_AGGREGATES.items()))
    question = f"What is the {word} {target} of {which}?"
    return Example(question, f"SELECT {function}({target}) FROM {table}{where};")


def _ordinal(day: int) -> str:
    return {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
