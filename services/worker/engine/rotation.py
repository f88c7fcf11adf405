"""Rotary embeddings: cosines and sines by position, with the scalings that models come with.

The frequencies are computed in fp32 in the same order of operations as in the reference
implementation (transformers): at position 100,000 one unit in the last place of a frequency is an
angle of 0.006.
"""

import math
from typing import assert_never

import torch
from torch import Tensor

from services.common.base_model import LinearRope, Llama3Rope, ModelConfig, YarnRope


def rotation_tables(
    config: ModelConfig, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine `[positions, 1, head_dim]`: rotated x is x cos + roll(x, d/2) sin."""
    angles = torch.outer(torch.arange(positions).float(), rotation_frequencies(config))
    angles = angles.unsqueeze(1)
    scale = rotation_scale(config)
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1) * scale
    signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1) * scale
    return cos.to(device), signed_sin.to(device)


def rotation_scale(config: ModelConfig) -> float:
    """What cosine and sine are multiplied by."""
    return rope.attention_factor if isinstance(rope := config.rope_scaling, YarnRope) else 1.0


def rotation_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of a head's values, `[head_dim / 2]` fp32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    periods = config.rope_theta ** (half / config.head_dim)
    match config.rope_scaling:
        case None:
            return 1.0 / periods
        case LinearRope(factor=factor):
            return 1.0 / periods / factor
        case Llama3Rope() as rope:
            return _llama3(1.0 / periods, rope)
        case YarnRope() as rope:
            return _yarn(periods, rope, config)
        case _:
            assert_never(config.rope_scaling)


def _llama3(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(periods: Tensor, rope: YarnRope, config: ModelConfig) -> Tensor:
    """A ramp over the pairs: those before it are kept, those behind it divided by the factor."""

    def pair_with(turns: float) -> float:
        """The pair, as a fraction, that turns so often over the original context."""
        wavelength = rope.original_max_positions / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    width = last - first if last != first else 0.001  # the reference's way not to divide by 0
    ramp = ((torch.arange(len(periods)).float() - first) / width).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - keep) + 1.0 / periods * keep
