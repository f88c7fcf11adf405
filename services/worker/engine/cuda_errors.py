"""What a failure of the CUDA device is called."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from services.worker.engine.api import EngineLostError


@contextmanager
def device_errors() -> Generator[None]:
    """A device that failed computes nothing any more, whatever it is asked: EngineLostError."""
    try:
        yield
    except torch.AcceleratorError as error:
        message = str(error).partition("\n")[0]
        raise EngineLostError(f"the CUDA device failed: {message}") from error
