"""A linear layer that multiplies with weights in the layout the CPU likes best.

`F.linear` in bf16 lays the weight out anew on every call. oneDNN can do that once, through private
torch operators; this module asks at start-up whether they are there and agree with `F.linear`, and
falls back to it. Packing pays for any number of rows, most for one.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)


class Linear(Protocol):
    """`x [rows, in] -> [rows, out]`."""

    def __call__(self, x: Tensor) -> Tensor: ...


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest available form. `weight [out, in]` need not be kept by the caller."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_pack():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # noqa: SLF001
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._multiply(x, self._packed, self._bias, "none", [], "")
        return y


@cache
def can_pack() -> bool:
    """Whether packed bf16 linears exist here and compute what `F.linear` computes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    bias = torch.randn(96, generator=generator).bfloat16()
    try:
        for rows in (1, 7):
            x = torch.randn(rows, 64, generator=generator).bfloat16()
            expected = F.linear(x.float(), weight.float(), bias.float())
            actual = PackedLinear(weight, bias)(x).float()
            if not torch.allclose(actual, expected, atol=0.125, rtol=0.02):
                return False
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True
