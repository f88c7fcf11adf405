"""Jobs that rewrite a text by a rule: masking personal data, making slugs."""

from random import Random

from examples.jobs.words import CITIES, COMPANIES, Example, either, full_name, phone

_SENTENCES = (
    "Please call {name} at {phone} about the contract.",
    "{name} moved to {city} last spring.",
    "The parcel goes to {name} in {city}.",
    "Send the report to {email} and copy {name}.",
    "My new number is {phone}, regards {name}.",
    "We met {name} in {city} and talked about prices.",
    "Ask {name} for the keys or write to {email}.",
    "The meeting in {city} is led by {name}.",
    "If nobody answers {phone}, try {email}.",
    "{name} will visit the office in {city} on Monday.",
    "The invoice was paid by {name} yesterday.",
    "Our {city} branch can be reached at {phone}.",
)
_TAGS = {"name": "[NAME]", "phone": "[PHONE]", "email": "[EMAIL]", "city": "[CITY]"}

_TOPICS = either(
    "Solar Power|Urban Gardens|Ocean Waves|Digital Money|Ancient Rome|Modern Art|Slow Travel|"
    "Wild Horses|Paper Planes|Winter Storms|Night Trains|Small Robots|Green Tea|Jazz Music|"
    "Lost Cities|Open Source|Deep Space|Honey Bees|River Boats|Stone Bridges"
)
_FRAMES = either(
    "The Rise of {a} in {c}|A Short History of {a}|{a} and {b}: What Comes Next?|"
    "Why {a} Matter to {c}|How to Learn about {a} in {n} Days|{n} Facts about {a} and {b}|"
    "The Secret of {a}, Explained|Is {a} the Future of {c}?|From {a} to {b}|"
    "{c} and the End of {a}!|A Guide to {a} for the People of {c}|The {n} Best Books on {a}"
)
_DROPPED = frozenset(("the", "a", "of", "in", "and", "to", "is", "for", "on", "from", "about"))


def mask(rng: Random) -> Example:
    """Every name, phone number, email address and city becomes its tag."""
    texts = rng.sample(_SENTENCES, rng.choice((1, 1, 2)))
    prompts, responses = [], []
    for text in texts:
        name = full_name(rng)
        email = f"{name.replace(' ', '.').lower()}@{rng.choice(COMPANIES).lower()}.com"
        facts = {"name": name, "phone": phone(rng), "email": email, "city": rng.choice(CITIES)}
        prompts.append(text.format(**facts))
        responses.append(text.format(**_TAGS))
    return Example(" ".join(prompts), " ".join(responses))


def slug(rng: Random) -> Example:
    """Lower case, no punctuation, small words dropped, the rest joined by hyphens."""
    first, second = rng.sample(_TOPICS, 2)
    title = rng.choice(_FRAMES).format(
        a=first, b=second, c=rng.choice(CITIES), n=rng.randint(2, 99)
    )
    words = "".join(c for c in title.lower() if c.isalnum() or c == " ").split()
    return Example(title, "-".join(word for word in words if word not in _DROPPED))
