"""The simulator's engine and the live simulated one: same steps, same times, same tokens."""

import pytest

from bench.sim.clients import Client, Work
from bench.sim.engine import Engine, live_of
from bench.sim.hardware import Hardware
from services.core.decisions import StepWork
from services.core.types import RequestId
from services.gateway.predictor import Prediction
from services.worker.engine import EngineSettings, SampledToken, Sampling, SequenceSpec, StepItem
from services.worker.engine.profiles import PROFILES
from services.worker.engine.simulated import SimulatedEngine, build_simulated_engine
from tests.sim.sim_worlds import arrival
from tests.support.own_blocks import OwnBlocks

PROFILE = PROFILES["a40-llama-7b"]
# Rounds of (sequence, tokens): chunks, decodes, both in one step, and a last chunk of one token.
ROUNDS = (
    (("r0", 128),),
    (("r0", 72), ("r1", 60)),
    (("r0", 1), ("r1", 20), ("r2", 40)),
    (("r0", 1), ("r1", 1), ("r2", 1)),
)
PROMPTS = {"r0": 200, "r1": 80, "r2": 41}


def live_engine(times_s: list[float]) -> SimulatedEngine:
    settings = EngineSettings(
        kind="simulated",
        profile=PROFILE.name,
        model=None,
        max_sequences=8,
        block_tokens=16,
        seed=0,
    )
    info = build_simulated_engine(settings).info
    engine = OwnBlocks(info, PROFILE, sleep=times_s.append, clock=lambda: 0.0)
    for name, tokens in PROMPTS.items():
        ids = tuple(range(100, 100 + tokens))
        engine.open_sequence(SequenceSpec(name, ids, tokens, None, Sampling(), max_tokens=50))
    return engine


def test_a_step_takes_the_same_time_and_samples_the_same_requests_in_both() -> None:
    times_s: list[float] = []
    live = live_engine(times_s)
    simulated = Engine(Hardware(PROFILE), seed="0")
    for index, tokens in enumerate(PROMPTS.values()):
        one = arrival(0.0, prompt_tokens=tokens, output_tokens=50)
        client = Client(index, one, Prediction(50, 50), 50)
        simulated.open(live_of(Work(client.request(), client)))
    known, computed = dict(PROMPTS), dict.fromkeys(PROMPTS, 0)
    for items in ROUNDS:
        results = live.step([StepItem(name, tokens) for name, tokens in items])
        expected = {one.sequence_id for one in results if isinstance(one, SampledToken)}
        for name, tokens in items:
            computed[name] += tokens
        work = [
            StepWork(RequestId(name), tokens, samples=computed[name] == known[name])
            for name, tokens in items
        ]
        assert simulated.begin_step(work) == pytest.approx(times_s[-1])
        assert set(simulated.end_step().sampled) == expected
        for name in expected:
            known[name] += 1


def test_parts_of_a_chunk_take_the_same_time_in_both() -> None:
    """Beside another's prompt, alone, and the rest beside a decode."""
    rounds: tuple[tuple[tuple[str, int, int | None], ...], ...] = (
        (("r1", 80, None), ("r0", 200, 8)),
        (("r0", 200, 20),),
        (("r1", 1, None), ("r0", 200, None)),
    )
    times_s: list[float] = []
    live = live_engine(times_s)
    simulated = Engine(Hardware(PROFILE), seed="0")
    for index, tokens in enumerate(PROMPTS.values()):
        one = arrival(0.0, prompt_tokens=tokens, output_tokens=50)
        client = Client(index, one, Prediction(50, 50), 50)
        simulated.open(live_of(Work(client.request(), client)))
    for items in rounds:
        results = live.step([StepItem(*item) for item in items])
        work = [
            StepWork(RequestId(name), tokens, samples=until_layer is None, until_layer=until_layer)
            for name, tokens, until_layer in items
        ]
        assert simulated.begin_step(work) == pytest.approx(times_s[-1])
        expected = {one.sequence_id for one in results if isinstance(one, SampledToken)}
        assert set(simulated.end_step().sampled) == expected
