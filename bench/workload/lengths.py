"""How long prompts and answers are: tables of public traces, or generators fitted to them.

The fitted ones draw prompt and answer apart, because the public traces show no correlation between
the two (-0.11 in the conversation trace). Their quantiles are the published ones; between two of
them the logarithm of the length is linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.workload.public_data import read_clients, read_pairs

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Quantiles = tuple[tuple[float, float], ...]  # (probability, tokens)


class LengthModel(Protocol):
    """Draws lengths for requests of given adapters."""

    @property
    def name(self) -> str:
        """Name that it is loaded by; "(fitted)" is added where the data is absent."""
        ...

    @property
    def shares(self) -> Floats | None:
        """How much of the traffic each of its clients makes; None: it knows no clients."""
        ...

    def draw(self, adapters: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Prompt and output tokens, each at least 1, for requests of these adapter indices."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Recorded pairs, drawn with replacement."""

    name: str
    prompt_tokens: Ints
    output_tokens: Ints
    shares: None = None

    def draw(self, adapters: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        rows = rng.integers(len(self.prompt_tokens), size=len(adapters))
        return self.prompt_tokens[rows], self.output_tokens[rows]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Quantiles of both lengths, drawn apart."""

    name: str
    prompt: Quantiles
    output: Quantiles
    shares: None = None

    def draw(self, adapters: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        prompt_u, output_u = rng.random((len(adapters), 2)).T
        return _at(self.prompt, prompt_u), _at(self.output, output_u)


@dataclass(frozen=True, slots=True, eq=False)
class Clients:
    """One length distribution per client. Adapter i stands for client i, modulo their number."""

    name: str
    q: Floats  # [quantiles]
    prompt_q: Floats  # [clients, quantiles]
    output_q: Floats
    rates: Floats  # [clients]

    @property
    def shares(self) -> Floats:
        return np.asarray(self.rates / self.rates.sum(), dtype=np.float64)

    def draw(self, adapters: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        clients = adapters % len(self.rates)
        prompt_u, output_u = rng.random((len(adapters), 2)).T
        return self._at(self.prompt_q, clients, prompt_u), self._at(
            self.output_q, clients, output_u
        )

    def _at(self, table: Floats, clients: Ints, u: Floats) -> Ints:
        tokens = np.empty(len(u))
        for client in np.unique(clients):
            mine = clients == client
            tokens[mine] = np.interp(u[mine], self.q, table[client])
        return np.maximum(1, np.rint(tokens).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Scaled:
    """Another model's lengths, times one constant."""

    model: LengthModel
    scale: float

    @property
    def name(self) -> str:
        return f"{self.model.name} x{self.scale:g}"

    @property
    def shares(self) -> Floats | None:
        return self.model.shares

    def draw(self, adapters: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        prompt, output = self.model.draw(adapters, rng)
        return self._scaled(prompt), self._scaled(output)

    def _scaled(self, tokens: Ints) -> Ints:
        return np.asarray(np.maximum(1, np.rint(tokens * self.scale)), dtype=np.int64)


def load_lengths(name: str, *, scale: float = 1.0) -> LengthModel:
    """One of `LENGTHS`, all lengths times `scale`. Raises KeyError for an unknown name."""
    model = LENGTHS[name]()
    return model if scale == 1.0 else Scaled(model, scale)


def _at(quantiles: Quantiles, u: Floats) -> Ints:
    probabilities, tokens = zip(*quantiles, strict=True)
    drawn = np.exp(np.interp(u, probabilities, np.log(tokens)))
    return np.maximum(1, np.rint(drawn).astype(np.int64))


# Published quantiles. The lowest lengths are guesses that bring the means near the published ones
# (1155 and 211 tokens in the conversation trace, 2048 and 28 in the code trace).
_FITTED: Final[dict[str, tuple[Quantiles, Quantiles]]] = {
    "azure-conv": (
        ((0.0, 20), (0.5, 1020), (0.9, 2734), (0.99, 4142), (1.0, 14050)),
        ((0.0, 30), (0.5, 129), (0.75, 395), (0.9, 424), (0.99, 601), (1.0, 1000)),
    ),
    "azure-code": (
        ((0.0, 60), (0.5, 1469), (0.9, 5400), (1.0, 7437)),
        ((0.0, 3), (0.5, 13), (0.9, 60), (0.99, 251), (1.0, 1899)),
    ),
    "arxiv": (
        ((0.0, 900), (0.5, 2730), (0.9, 3702), (1.0, 4000)),
        ((0.0, 30), (0.5, 167), (0.9, 372), (0.99, 2000), (1.0, 3000)),
    ),
    "sharegpt": (
        ((0.0, 10), (0.5, 588), (0.9, 1587), (0.99, 2091), (1.0, 2500)),
        ((0.0, 10), (0.5, 273), (0.95, 760), (1.0, 1500)),
    ),
}


def _pairs_model(name: str) -> LengthModel:
    pairs = read_pairs(name)
    if pairs is None:
        return Fitted(f"{name} (fitted)", *_FITTED[name])
    return Table(name, *pairs)


def _clients_model(name: str) -> LengthModel:
    """Fitted: clients explain 78 % of the variance of log output length."""
    arrays = read_clients(name)
    if arrays is not None:
        return Clients(
            f"servegen-{name}", arrays["q"], arrays["in_q"], arrays["out_q"], arrays["rate"]
        )
    rng = np.random.default_rng(0)
    q = np.linspace(0.001, 0.999, 103)
    within = np.quantile(rng.normal(size=100_000), q)
    medians = np.exp(rng.normal(size=(2, 100)) * np.sqrt(0.78) + np.log([[300.0], [80.0]]))
    spread = np.exp(within * np.sqrt(0.22))
    rates = np.power(np.arange(1.0, 101.0), -1.2, dtype=np.float64)
    tables = medians[:, :, None] * spread
    return Clients(f"servegen-{name} (fitted)", q, tables[0], tables[1], rates)


LENGTHS: Final[dict[str, Callable[[], LengthModel]]] = {
    **{name: partial(_pairs_model, name) for name in _FITTED},
    **{f"servegen-{name}": partial(_clients_model, name) for name in ("m-large", "m-mid")},
}
