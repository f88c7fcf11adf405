"""The physical limit of a knee: work per request against time, as if work were a fluid.

At a rate r a second of the device holds r prompts and their decodes. A step with prompts that lasts
tau (the bound on the time between tokens) spends F of it on what every such step costs. So

    r <= (1 - F / tau) / (P + D)

P: mean prefill per request, D: mean decode of all its tokens but the first, by the true costs of
the hardware, with tokens that read their own context. Without a bound on the time between tokens
memory bounds it: the r x steps x tau requests that decode hold K tokens x steps each on average,
and the pool must hold them, so tau <= pool / (r K) and

    r <= 1 / (P + D + F K / pool)

No policy can be above the smaller of both; kernels can move it. Left out, so that it stays a bound:
memory of adapters, and chunks that read the cached part of their prompt.
"""

from statistics import fmean

from bench.sim import Hardware
from bench.workload import Arrival, Trace


def fluid_bound_rps(trace: Trace, hardware: Hardware, *, tbt_s: float | None = 0.15) -> float:
    """Requests per second of one worker; by memory alone without `tbt_s`."""
    profile = hardware.profile
    fixed_ms = profile.fixed_ms + profile.prefill_lora_ms
    pool_tokens = profile.memory_bytes / profile.kv_bytes_per_token
    work_ms = fmean(_work_ms(arrival, hardware) for arrival in trace.arrivals)
    held_tokens = fmean(_held_tokens(arrival) for arrival in trace.arrivals)
    by_memory_rps = 1000 / (work_ms + fixed_ms * held_tokens / pool_tokens)
    if tbt_s is None:
        return by_memory_rps
    return min(by_memory_rps, (1000 - fixed_ms / tbt_s) / work_ms)


def _work_ms(arrival: Arrival, hardware: Hardware) -> float:
    profile = hardware.profile
    rank = arrival.adapter.rank if arrival.adapter is not None else 0
    prefill_ms = arrival.prompt_tokens * (profile.token_ms + profile.rank_token_ms * rank)
    steps = arrival.output_tokens - 1
    decode_ms = steps * (profile.sequence_ms + profile.decode_rank_ms * rank)
    return prefill_ms + decode_ms + profile.cached_token_ms * _held_tokens(arrival)


def _held_tokens(arrival: Arrival) -> float:
    """Summed over its decode steps."""
    return (arrival.output_tokens - 1) * (arrival.prompt_tokens + arrival.output_tokens / 2)
