"""The report over policies: its bound by hand, its jobs, and one section from end to end."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import report
from bench.policies import knees, loads, sections
from bench.policies.extent import FULL, QUICK, Extent
from bench.policies.fluid import fluid_bound_rps
from bench.policies.jobs import run_sections
from bench.policies.tables import TABLES, filled
from bench.policies.world import CALIBRATIONS, MAIN, Run, World, system_of
from bench.sim import Knee
from tests.sim.sim_worlds import POOL, arrival, card, trace

PNG = b"\x89PNG"


def test_the_fluid_bound_is_the_hand_computed_one() -> None:
    adapter = POOL.adapters()[0]
    assert adapter.rank == 8
    world = trace(arrival(0.0, adapter=adapter, prompt_tokens=200, output_tokens=11))
    prefill_ms = 200 * (0.173 + 1.29e-3 * 8)
    decode_ms = 10 * (0.1 + 0.0042 * 8 + 1.08e-3 * (200 + 5.5))
    work_ms = prefill_ms + decode_ms
    assert fluid_bound_rps(world, card()) == pytest.approx((1 - 17.5 / 150) * 1000 / work_ms)
    memory_ms = 17.5 * 10 * (200 + 5.5) / 60_000
    assert fluid_bound_rps(world, card(), tbt_s=None) == pytest.approx(1000 / (work_ms + memory_ms))
    scarce = fluid_bound_rps(world, card(500))
    assert scarce == fluid_bound_rps(world, card(500), tbt_s=None) < 0.8 * 1000 / work_ms


def test_cheaper_kernels_move_the_bound_and_longer_requests_lower_it() -> None:
    def bound(world: World) -> float:
        built = world.scenario(system_of("fifo"), 8.0, 0).trace
        return fluid_bound_rps(built, world.hardware)

    bounds = [bound(world.lasting(60.0)) for world in CALIBRATIONS]
    scales = [world.workload.scale for world in CALIBRATIONS]
    assert sorted(bounds, reverse=True) == [
        one for _, one in sorted(zip(scales, bounds, strict=True))
    ]
    cheaper = replace(MAIN, hardware=card().with_lora_scale(0.1))
    assert bound(cheaper.lasting(60.0)) > bounds[0]


@pytest.mark.parametrize("extent", [FULL, QUICK])
def test_every_job_can_go_to_another_process(extent: Extent) -> None:
    for section in sections(extent):
        assert section.jobs
        for job in section.jobs.values():
            assert pickle.loads(pickle.dumps(job)) == job
            assert job.cost_s > 0


def test_the_same_job_gives_the_same_figures() -> None:
    job = Run(MAIN.lasting(20.0), "adaptive", 6.0, seed=3)
    assert job.run() == job.run()


def test_a_section_goes_from_jobs_to_rows_targets_and_a_figure() -> None:
    extent = replace(QUICK, loads_rps=(6.0, 9.0), load_s=15.0)
    section = loads.section(extent)
    assert len(section.jobs) == 2 * 5
    (found,) = run_sections([section])
    assert [(row["rate_rps"], row["system"]) for row in found.rows[:2]] == [
        (6.0, "slora"),
        (6.0, "slora-strong"),
    ]
    assert found.rows[0]["p99_change"] == 0
    assert {target.is_upper for target in found.targets} == {False, True}
    assert all(png.startswith(PNG) for png in found.figures.values())


def test_claims_are_ratios_of_knees_and_name_what_is_missing() -> None:
    section = knees.section(QUICK)
    base = Knee((8.6,), (8.6,))
    results = dict.fromkeys(section.jobs, base)
    results["main", "adaptive"] = Knee((11.0,), (10.4,))
    found = section.findings(results)
    claims = {row["claim"]: row for row in found.rows if "claim" in row}
    ours = claims["adaptive's joint knee over slora's"]
    assert ours["ratio"] == pytest.approx(10.4 / 8.6)
    assert ours["missing_lever"].startswith("work")
    assert claims["adaptive's joint knee over slora-strong's"]["missing_lever"] == "none"
    assert claims["chameleon's TTFT knee over slora's"]["missing_lever"].startswith("order")


def test_a_report_is_json_with_its_figures_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"a": 1.0}, {"b": float("inf")}]
    target = report.Target("late", 1.0, float("nan"), "s", is_upper=True)
    path = tmp_path / "policies.json"
    report.write(report.Report(rows, [target], {"one.png": PNG}), path)
    document = json.loads(path.read_text())
    assert document["rows"] == [{"a": 1.0}, {"b": None}]
    assert document["targets"][0]["holds"] is False
    assert (tmp_path / "policies" / "one.png").read_bytes() == PNG
    assert "MISSED: late" in capsys.readouterr().out


def test_every_table_of_the_document_is_one_that_can_be_filled() -> None:
    document = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- table: (\w+) -->", document)
    assert set(names) == {*TABLES, "targets"}
    assert document.count("<!-- end -->") == len(names)


def test_a_table_is_written_between_its_marks_and_can_be_written_again() -> None:
    row = {"section": "scale", "workers": 64, "adapters": 100, "requests": 5}
    rows = [row | {"cpu_s": 1.23456, "p99_ttft_s": None}, {"section": "scale"}]
    text = "before\n<!-- table: scale -->\nold\n<!-- end -->\nafter\n"
    once = filled(text, {"rows": rows})
    assert "| 64 | 100 | 5 | 1.23 | - |\n<!-- end -->\nafter" in once
    assert "old" not in once
    assert filled(once, {"rows": rows}) == once
