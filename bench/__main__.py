"""`python -m bench NAME [--quick] [--json FILE]`."""

import argparse
import importlib
import os
from pathlib import Path
from typing import Final

from bench import report

NAMES: Final = {
    "spine": "32 concurrent requests over 8 adapters and the base: the suite against PEFT",
    "accuracy": "each example adapter at its own job, through the whole suite, against the base",
    "policies": "every policy simulated: knees, tails, regimes, tenants, faults, against S-LoRA",
    "uellm": "UELLM's experiment rebuilt, and the default policy beside its systems",
    "cache": "eviction policies of the adapter cache against LRU and Belady, alone and in a worker",
    "control": "submit + dispatch + finish cycles per second of the scheduler's core",
    "coldstart": "a cold adapter's first token, what of its load is hidden, and what others feel",
    "registry": "100,000 adapters: resolving, pages, watches, and whose memory they take",
    "replay": "one trace live over gRPC and simulated: same decisions, same times to first token",
    "engine": "our engine's tiers on the CPU against PEFT, llama.cpp and vLLM, side by side",
    "engine.through": "mixed adapters through the whole suite against the bare engine",
    "gpu": "parity, ceilings, kernels and whole steps on one CUDA device, with random weights",
    "stream": "downloads from the adapter store against a plain gRPC stream and against S3",
}


def main() -> None:
    """Run one benchmark and write its report. Exits 1 when a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:14} {what}" for name, what in NAMES.items()),
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="end within a minute on two cores")
    parser.add_argument(
        "--setup-peers", action="store_true", help="engine: install its peers first, in the cache"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="gpu: how long it may take")
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="gpu: try the code without one, tiny shapes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args()
    if arguments.name == "gpu":
        _run_gpu(arguments)
    if arguments.setup_peers:
        from bench.peers import environments

        environments.set_up()
    result: report.Report = importlib.import_module(f"bench.{arguments.name}").run(
        quick=arguments.quick
    )
    report.write(result, arguments.json)
    raise SystemExit(0 if all(target.holds for target in result.targets) else 1)


def _run_gpu(arguments: argparse.Namespace) -> None:
    """Exits as `main` does. A dry run misses what it likes, and writes a report if asked."""
    if arguments.dry_run_cpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    from bench.gpu.run import default_path, run

    result = run(minutes=arguments.minutes, is_dry=arguments.dry_run_cpu)
    path = arguments.json
    report.write(result, path if path or arguments.dry_run_cpu else default_path())
    holds = arguments.dry_run_cpu or all(target.holds for target in result.targets)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
