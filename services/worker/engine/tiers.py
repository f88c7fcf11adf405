"""What computes a model on the CPU: compiled code where it can, else torch.

The native step serves bfloat16, if its library is there, if this CPU has the instructions, if its
probe is right, and if it has code for the model's shape. Every reason against it is a clause that
the worker's log has at start.
"""

import torch

from services.common.base_model import ModelConfig
from services.worker.engine.api import EngineInfo, EngineSettings
from services.worker.engine.model import Weights
from services.worker.engine.native_executor import NativeExecutor
from services.worker.native.library import NativeError, Unavailable
from services.worker.native.probe import find_library


def native_tier(
    settings: EngineSettings, config: ModelConfig, info: EngineInfo
) -> NativeExecutor | Unavailable:
    """The native step with the model's weights, or why not.

    Raises BaseModelError for the weights, and ValueError where the settings ask for this tier and
    it can't serve.
    """
    if settings.tier == "torch":
        return Unavailable("the torch tier is asked for")
    executor = _open(settings, config, info)
    if settings.tier == "native" and isinstance(executor, Unavailable):
        raise ValueError(
            f"the native tier cannot serve: {executor.reason}; with the tier auto torch does"
        )
    return executor


def _open(
    settings: EngineSettings, config: ModelConfig, info: EngineInfo
) -> NativeExecutor | Unavailable:
    assert settings.model is not None
    if settings.device != "cpu" or settings.dtype != "bfloat16":
        return Unavailable("it computes in bfloat16 on the CPU only")
    library = find_library()
    if isinstance(library, Unavailable):
        return library
    threads = settings.threads or torch.get_num_threads()
    try:
        executor = NativeExecutor(library, config, info, threads=threads)
        executor.load(Weights(settings.model, dtype=torch.bfloat16, device=torch.device("cpu")))
    except NativeError as error:
        return Unavailable(str(error))
    return executor
