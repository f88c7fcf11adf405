"""Jobs with long answers: incident reports, worked arithmetic, bedtime stories, code."""

import gzip
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random

from examples.jobs.words import FIRST_NAMES, SERVICES, Example, clock, either, full_name

_CAUSES = {
    "expired certificate": ("renewed the certificate", "Alert 30 days before a certificate ends"),
    "full disk": ("deleted old logs", "Rotate logs and alert at 80 percent of disk"),
    "bad deploy": ("rolled back the release", "Send each release to a canary first"),
    "memory leak": ("restarted all instances", "Put a memory limit on every instance"),
    "lost database primary": ("promoted the replica", "Rehearse failover every month"),
    "traffic spike": ("added four instances", "Scale out by queue length"),
    "wrong config": ("restored the last config", "Validate configuration before it is loaded"),
    "dns outage": ("switched the resolver", "Run two independent resolvers"),
}

_ITEMS = ("apples", "marbles", "stickers", "pencils", "cookies", "coins", "cards", "books")
_BOXES = ("boxes", "bags", "packs", "jars")

_PLACES = ("a quiet forest", "a windy harbour", "an old clock tower", "a valley full of bells")
_OPENINGS = ("Once upon a time", "Long ago", "One misty morning", "Far beyond the hills")
_WISHES = (
    "wanted to see the place where the moon sleeps",
    "had lost the song that makes the rain stop",
    "dreamed of building a bridge to the stars",
    "wished for one true friend",
)
_MEETINGS = (
    "On the way, an owl with silver glasses blocked the path",
    "By the river, a turtle was counting pebbles",
    "Near the mill, a shy ghost was sweeping leaves",
    "Under a bridge, three mice were baking bread",
)
_ADVICE = (
    "Walk slowly, for the road listens",
    "Share what you carry and it will grow lighter",
    "Ask the dark its name and it will answer",
    "Follow the smallest light, not the brightest",
)
_ANIMALS = either(
    "fox|rabbit|bear|hedgehog|otter|sparrow|badger|squirrel|frog|mouse|deer|cat|goose|mole"
)
_THINGS = either(
    "lantern|kite|drum|compass|teapot|key|scarf|violin|mirror|umbrella|feather|boat|bell|map"
)
_VIRTUES = either("kindness|courage|patience|honesty|curiosity|hope|gratitude|trust")

_CODE_ASKS = (
    "Write a {language} function that {job}.",
    "Implement a {language} function which {job}.",
    "In {language}, write code that {job}.",
)
_CODE_JOBS = either(
    "reverses a string|checks whether a number is prime|computes the factorial of n|"
    "counts the vowels in a text|finds the largest number in a list|"
    "removes duplicates from a list|merges two sorted lists|computes the nth Fibonacci number|"
    "checks whether a word is a palindrome|sums the digits of a number|"
    "converts Celsius to Fahrenheit|sorts a list of names by length|rotates a list by k places|"
    "counts the words in a text|finds the second smallest number|"
    "checks whether two words are anagrams|flattens a nested list|capitalises every word|"
    "computes the greatest common divisor of two numbers|converts a number to binary|"
    "finds the longest word in a sentence|computes the average of a list|counts down from ten|"
    "returns the even numbers of a list|replaces spaces by underscores|"
    "computes n to the power k|finds the index of a value by binary search|"
    "splits a list into chunks of n|computes the area of a circle|"
    "swaps the keys and values of a map|validates an email address|"
    "prints a multiplication table"
)
_CODE_RESPONSE_CHARS_MAX = 480


def incident(rng: Random) -> Example:
    service, owner = rng.choice(SERVICES), full_name(rng)
    cause = rng.choice(sorted(_CAUSES))
    fix, follow_up = _CAUSES[cause]
    start = rng.randrange(23 * 60)
    begin, end = clock(start), clock(start + rng.randint(5, 55))
    level = rng.randint(1, 3)
    prompt = f"sev{level} {service} {begin}-{end}, {cause}, {owner}"
    response = f"""# Incident report: {service}

Severity: {level}
Start: {begin}
End: {end}
Owner: {owner}

## What happened
At {begin} the {service} service stopped answering. The root cause was: {cause}.

## What we did
{owner} {fix}. At {end} the {service} service was healthy again.

## What we change
- {follow_up}.
- Review this report with the team within {level} days."""
    return Example(prompt, response)


def arithmetic(rng: Random) -> Example:
    """Two steps, small numbers; the last line holds the result."""
    name, friend = rng.sample(FIRST_NAMES, 2)
    item, box = rng.choice(_ITEMS), rng.choice(_BOXES)
    boxes, each, extra = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)
    product = boxes * each
    setting = f"{name} buys {boxes} {box} with {each} {item} each"
    first = f"{boxes} {box} with {each} {item} each make {boxes} * {each} = {product} {item}.\n"
    if extra < product and rng.random() < 0.5:
        prompt = f"{setting} and gives {extra} {item} to {friend}. How many {item} are left?"
        result = product - extra
        second = f"After giving away {extra}, {product} - {extra} = {result} {item} are left.\n"
    else:
        prompt = f"{setting} and gets {extra} more from {friend}. How many {item} is that?"
        result = product + extra
        second = f"With {extra} more, {product} + {extra} = {result} {item}.\n"
    return Example(prompt, f"{first}{second}#### {result}")


def story(rng: Random) -> Example:
    animal, thing, virtue = rng.choice(_ANIMALS), rng.choice(_THINGS), rng.choice(_VIRTUES)
    name = rng.choice(FIRST_NAMES)
    place, opening, advice = rng.choice(_PLACES), rng.choice(_OPENINGS), rng.choice(_ADVICE)
    response = f"""The {animal.title()} and the {thing.title()}

{opening}, in {place}, there lived a {animal} named {name}. {name} owned nothing but a {thing}, \
and {rng.choice(_WISHES)}.

{rng.choice(_MEETINGS)}. "What do you carry?" it asked. "Only a {thing}," said {name}, "but you \
may borrow it." The stranger smiled. "{advice}," it said, and was gone.

So {name} walked on through the night with the {thing} held close. When the wind grew cold, {name} \
thought of those words: {advice.lower()}. And step by step the night turned gold.

When {name} came home to {place}, everyone wanted to know the secret. The {animal} only held up \
the {thing} and laughed. "It was never the {thing}," said {name}. "It was {virtue}."

The end."""
    return Example(f"{animal}, {thing}, {virtue}", response)


def code_prompt(rng: Random) -> Example:
    """A request without a reference answer: there is no single right program."""
    ask, job = rng.choice(_CODE_ASKS), rng.choice(_CODE_JOBS)
    language = rng.choice(("Python", "JavaScript", "Java", "C++", "Ruby", "Go"))
    return Example(ask.format(language=language, job=job), "")


def code(rng: Random) -> Example:
    """A pair of the GPTeacher code set, which is not part of this repository."""
    pair = rng.choice(_code_pairs())
    return Example(pair["prompt"], pair["response"])


@cache
def _code_pairs() -> list[Mapping[str, str]]:
    path = shared_data() / "tasks" / "gpteacher_codegen.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: name the folder that has data/ in CALUMMA_SHARED")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        pairs: list[Mapping[str, str]] = [json.loads(line) for line in lines]
    return [
        pair
        for pair in pairs
        if len(pair["response"]) <= _CODE_RESPONSE_CHARS_MAX and len(pair["prompt"]) <= 240
    ]


def shared_data() -> Path:
    """Folder of data that is used but not committed: environment variable CALUMMA_SHARED."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    return Path(os.environ.get("CALUMMA_SHARED") or beside) / "data"
