"""The engine: base model, KV cache, adapters and sampling behind one small interface.

Called by the worker. `build_engine` chooses between real computation with
torch and a simulation that takes the time of a hardware profile; torch is imported for the first
only.
"""

import os

from services.worker.engine.api import (
    AdapterIncompatibleError,
    DistributedEngine,
    Engine,
    EngineInfo,
    EngineLostError,
    EngineSettings,
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
    add_adapter,
)

__all__ = [
    "AdapterIncompatibleError",
    "DistributedEngine",
    "Engine",
    "EngineInfo",
    "EngineLostError",
    "EngineSettings",
    "SampledToken",
    "Sampling",
    "SequenceFailure",
    "SequenceSpec",
    "StepItem",
    "add_adapter",
    "build_engine",
]


def build_engine(settings: EngineSettings) -> Engine:
    """Load the model and reserve memory. Raises BaseModelError and ValueError."""
    if settings.kind == "simulated":
        from services.worker.engine.simulated import build_simulated_engine

        return build_simulated_engine(settings)
    _share_cores()
    from services.worker.engine.build import build_model_engine

    return build_model_engine(settings)


def _share_cores() -> None:
    """Let threads that wait for each other sleep soon. Works until torch is first imported.

    libgomp's default is to spin for milliseconds. That is fastest on idle cores, but with one busy
    neighbour per core a decode step took 235 ms instead of 40 on two cores, and the other services
    are such neighbours. Set either variable to choose otherwise.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
