"""Jobs whose answer is a label of a few tokens: sentiment, ticket routing, log triage."""

from random import Random

from examples.jobs.words import FIRST_NAMES, SERVICES, Example, clock, digits, either, phone

_SUBJECTS = either(
    "battery|screen|keyboard|packaging|delivery|camera|sound|fit|fabric|price|support team|app|"
    "manual|handle|charger|design|zipper|lens|motor|taste"
)
_GOOD = either(
    "is excellent|works perfectly|exceeded my hopes|is a joy to use|feels solid|"
    "is better than I expected|has been flawless|made my day|is worth every cent|"
    "is simply great|still impresses me|is a real pleasure|could not be better|is wonderful"
)
_BAD = either(
    "is terrible|broke after a week|was a big letdown|feels cheap|is worse than I expected|"
    "has been a nightmare|ruined my weekend|is a waste of money|is simply awful|"
    "stopped working|still annoys me|is a real pain|could hardly be worse|is useless"
)
_OPENERS = ("", "", "Bought it in May. ", "Second order for me. ", "Ordered this for my father. ")

_TICKETS = {
    "billing": (
        "I was charged twice for order {n}.",
        "My invoice {n} shows the wrong amount.",
        "Why is there a fee of {d} dollars on my card?",
        "Please send me a receipt for payment {n}.",
        "The discount code was not applied to invoice {n}.",
        "My credit card was debited although the payment failed.",
    ),
    "shipping": (
        "My parcel {n} has not arrived yet.",
        "The tracking page for order {n} has not moved in {d} days.",
        "Can you deliver order {n} to another address?",
        "The courier left my package with a stranger.",
        "When will order {n} leave the warehouse?",
        "My delivery has been late for {d} days.",
    ),
    "account": (
        "I can't log in to my profile.",
        "Please change the email address of my account.",
        "I forgot my password and the reset link has expired.",
        "How do I delete my user profile?",
        "My account {n} has been locked since this morning.",
        "Someone else has signed in with my username.",
    ),
    "technical": (
        "The app crashes when I open the settings.",
        "Error code {d} appears every time I press save.",
        "The website does not load in my browser.",
        "After the update the sync button does nothing.",
        "The export to PDF freezes at {d} percent.",
        "Your API returns an error for request {n}.",
    ),
    "returns": (
        "I want to send back the shoes from order {n}.",
        "The jacket is too small, how do I return it?",
        "Where do I print the return label for order {n}?",
        "The vase arrived broken and I want my money back.",
        "I would like to exchange item {n} for another size.",
        "How many days do I have to give the item back?",
    ),
    "sales": (
        "Do you offer a discount for {d} licences?",
        "What does the enterprise plan cost for {d} people?",
        "Could I get a quote for {d} units?",
        "Is there a demo of the premium version?",
        "We are thinking of buying {d} seats for our team.",
        "Which plan would you recommend for a company of {d}?",
    ),
}
_GREETINGS = ("", "Hi, ", "Hello team, ", "Good morning, ", "Dear support, ")
_CLOSINGS = ("", " Thanks!", " Regards, {who}", " Please help.", " Call me on {phone}.")

_ACTIONS = {
    "DEBUG": "ignore",
    "INFO": "ignore",
    "NOTICE": "ignore",
    "WARN": "watch",
    "WARNING": "watch",
    "ERROR": "ticket",
    "ERR": "ticket",
    "CRITICAL": "page",
    "FATAL": "page",
    "PANIC": "page",
}
_MESSAGES = either(
    "connection to db-{d} refused|request {n} took {d} ms|cache miss for key {n}|"
    "retry {d} of 5|disk is {d} percent full|worker {d} restarted|config reloaded|"
    "job {n} finished|certificate expires in {d} days|queue length is {d}|timeout after {d} s|"
    "token {n} rejected"
)


def sentiment(rng: Random) -> Example:
    first, second = rng.sample(_SUBJECTS, 2)
    label = rng.choice(("positive", "negative", "mixed"))
    pools = {"positive": (_GOOD, _GOOD), "negative": (_BAD, _BAD)}
    one, two = pools.get(label) or rng.choice(((_GOOD, _BAD), (_BAD, _GOOD)))
    joint = {"mixed": " but "}.get(label, " and ")
    text = f"The {first} {rng.choice(one)}{joint}the {second} {rng.choice(two)}."
    return Example(f"{rng.choice(_OPENERS)}{text}", label)


def ticket(rng: Random) -> Example:
    queue = rng.choice(sorted(_TICKETS))
    text = rng.choice(_GREETINGS) + rng.choice(_TICKETS[queue]) + rng.choice(_CLOSINGS)
    who = rng.choice(FIRST_NAMES)
    values = {"n": digits(rng, 5), "d": rng.randint(2, 90), "who": who, "phone": phone(rng)}
    return Example(text.format(**values), queue)


def log_line(rng: Random) -> Example:
    level = rng.choice(sorted(_ACTIONS))
    service = rng.choice(SERVICES)
    message = rng.choice(_MESSAGES).format(n=digits(rng, 4), d=rng.randint(2, 99))
    time = f"{clock(rng.randrange(24 * 60))}:{rng.randrange(60):02}"
    shape = rng.choice(
        (
            "{time} {level} [{service}] {message}",
            "{level} {time} {service}: {message}",
            "[{time}] {service} {level} - {message}",
            "time={time} level={level} svc={service} msg={message}",
        )
    )
    line = shape.format(time=time, level=level, service=service, message=message)
    return Example(line, f"{_ACTIONS[level]} {service}")
