"""Names that the adapter store did not have a moment ago, for one tenant, in bounded memory.

Made-up names must cost little however many there are: each is asked for at the store once per
`ABSENT_S`, and the oldest answers are forgotten first. No clock: `now` is an argument, seconds.
"""

from collections import OrderedDict
from typing import Final

from services.gateway.types import AdapterName

ABSENT_MAX: Final = 10_000
ABSENT_S: Final = 1.0


class Absences:
    """Who was told that which name is unknown, and until when that is believed."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[tuple[str, AdapterName], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def holds(self, tenant: str, name: AdapterName, *, now: float) -> bool:
        """True while the store's answer is fresh."""
        return now < self._until_s.get((tenant, name), 0.0)

    def add(self, tenant: str, name: AdapterName, *, now: float) -> None:
        """The store has just said that it does not have the name, or not for this tenant."""
        self._until_s[tenant, name] = now + ABSENT_S
        self._until_s.move_to_end((tenant, name))
        if len(self._until_s) > ABSENT_MAX:
            self._until_s.popitem(last=False)
