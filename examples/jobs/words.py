"""Words that several jobs draw from, and the pair that every job makes. All names are invented."""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Example:
    """What a user writes, and what the adapter must answer."""

    prompt: str
    response: str


def either(alternatives: str) -> tuple[str, ...]:
    """The alternatives of "one|two|three"."""
    return tuple(alternatives.split("|"))


FIRST_NAMES = either(
    "Ana|Ben|Chloe|Dana|Elif|Farid|Grace|Hugo|Ines|Jonas|Kira|Liam|Maria|Noah|Olga|Priya|Quinn|"
    "Rosa|Samir|Tara|Uma|Victor|Wanda|Yusuf|Zoe|Adrian|Bianca|Carlos|Diana|Emil|Fatima|Goran|"
    "Helen"
)
LAST_NAMES = either(
    "Adler|Baker|Castro|Demir|Evans|Fischer|Garcia|Hansen|Ivanov|Jensen|Kim|Lopez|Moreau|"
    "Nguyen|Okafor|Petrov|Quist|Rossi|Silva|Tanaka|Urban|Vogel|Weber|Young|Zeman|Ahmed|Brown|"
    "Costa|Duarte"
)
CITIES = either(
    "Berlin|Madrid|Oslo|Lisbon|Vienna|Dublin|Prague|Athens|Boston|Denver|Chicago|Seattle|"
    "Toronto|Sydney|Tokyo|Seoul|Nairobi|Lagos|Cairo|Lima"
)
COMPANIES = either(
    "Northwind|Bluefield|Ironwood|Clearwater|Sunridge|Oakline|Redstone|Silverleaf|Brightway|"
    "Lakeside|Greenbyte|Stonegate|Fairmont|Highland|Westbrook|Eastport"
)
SERVICES = either(
    "checkout-api|auth-service|search-index|billing-worker|image-resizer|mail-gateway|"
    "user-profile|payment-service|report-builder|cache-proxy|order-queue|session-store|"
    "video-encoder|cart-service"
)


def full_name(rng: Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def digits(rng: Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def phone(rng: Random) -> str:
    return f"{rng.choice('23456789')}{digits(rng, 2)}-555-{digits(rng, 4)}"


def clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"
