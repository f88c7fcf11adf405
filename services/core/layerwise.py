"""Prompts whose adapter is still coming are computed as far as its layers are here.

Rules:
- The first chunk of such a prompt is sized as any chunk, as if all its layers were computed, and
  holds its blocks from its first part on. Parts of it are the same tokens through more layers.
- A part is counted with its share of the layers. One that was begun goes on by as many layers as
  the step has time for, so it keeps the promise to those that decode, whenever it was sized.
- Each part costs launches and a read of its layers' weights again. So it waits while there are
  prompts that have all they need: they use the device as well. Beside decodes it waits until a
  share of the layers is new. And wherever the load, at the pace of its last layers, will have ended
  before a step without the part would, it waits for that. Else whatever is new goes at once.
- The last part comes with the end of the load. It alone samples, and only it computes tokens.
- A prompt of one token is a prompt as long as its adapter is coming, and then a decode.

After the idea of overlapping a model's loading with its computation layer by layer (PipeSwitch,
OSDI 2020), for adapters and with others' decodes in the same steps.
"""

from services.core.cache import AdapterCache
from services.core.decisions import StepWork
from services.core.roster import Roster
from services.core.sequence import Sequence


class LayerWise:
    """Which prompts can go on in a step, and how far."""

    def __init__(
        self, num_layers: int, *, min_share: float, roster: Roster, cache: AdapterCache
    ) -> None:
        self._num_layers = num_layers  # 0: steps compute all layers
        self._least_layers = max(1, int(num_layers * min_share))
        self._roster = roster
        self._cache = cache
        self._waits_s: list[float] = []  # until when those wait whose loads end soon

    @property
    def next_s(self) -> float | None:
        """When a load that a part waits for is late, so that the part waits no more."""
        return min(self._waits_s, default=None)

    def prompts(self, *, step_s: float, has_decodes: bool, now: float) -> list[Sequence]:
        """The prompts that are to go on, oldest first. `step_s`: of the step without them."""
        self._waits_s = []
        if self._roster.prompts:
            return self._roster.prompts
        least_layers = self._least_layers if has_decodes else 1
        new = [one for one in self._roster.early if self._new_layers(one) >= least_layers]
        return [one for one in new if not self._waits(one, step_s, now)]

    def begin(self, sequence: Sequence, tokens: int) -> StepWork:
        """Compute so many tokens, which have their blocks, as far as its adapter is here."""
        if sequence.ready_layers is None:
            samples = tokens == sequence.uncomputed_tokens
            return StepWork(sequence.request_id, tokens, samples)
        sequence.chunk_tokens = tokens
        return StepWork(sequence.request_id, tokens, samples=False, until_layer=self._top(sequence))

    def go_on(self, sequence: Sequence, room_tokens: int, *, must: bool) -> StepWork | None:
        """The rest of its chunk, or the layers that cost as much as so many tokens; `must`: one."""
        tokens = sequence.chunk_tokens
        layers = min(self._new_layers(sequence), room_tokens * self._num_layers // tokens)
        if layers <= 0 and not must:
            return None
        until_layer = sequence.passed_layers + max(1, layers)
        if until_layer < self._num_layers:
            return StepWork(sequence.request_id, tokens, samples=False, until_layer=until_layer)
        return StepWork(sequence.request_id, tokens, tokens == sequence.uncomputed_tokens)

    def share(self, sequence: Sequence, work: StepWork) -> float:
        """The share of the layers that its work passes."""
        if work.until_layer is None and not sequence.passed_layers:
            return 1.0
        until_layer = self._num_layers if work.until_layer is None else work.until_layer
        return (until_layer - sequence.passed_layers) / self._num_layers

    def _waits(self, sequence: Sequence, step_s: float, now: float) -> bool:
        """True while its load is to end within a step's time."""
        assert sequence.digest is not None
        loaded_by_s = self._cache.loaded_by_s(sequence.digest, num_layers=self._num_layers)
        if not now < loaded_by_s <= now + step_s:
            return False
        self._waits_s.append(loaded_by_s)
        return True

    def _new_layers(self, sequence: Sequence) -> int:
        return self._top(sequence) - sequence.passed_layers

    def _top(self, sequence: Sequence) -> int:
        return self._num_layers if sequence.ready_layers is None else sequence.ready_layers
