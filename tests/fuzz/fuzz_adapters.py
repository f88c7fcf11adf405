"""Coverage-guided fuzzing of what can be published: `python -m tests.fuzz.fuzz_adapters`.

Needs atheris (`pip install atheris`), which is no dependency of the project. The corpus begins with
adapters that are accepted; what is found joins it where `--corpus` names a folder to keep. An input
is u32 little-endian length of the config · config · weights. The first input that gives neither an
adapter nor a typed refusal is written to the working folder and ends the run with a stack trace.
"""

import argparse
import struct
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

INPUT_BYTES_MAX: Final = 2**14
_FUZZED: Final = ("services.adapter_store", "services.common.adapter_container")
# What mutations put in, besides what they see the code compare with.
_WORDS: Final = (
    r"\x22\x22:", r"\x22\x5cud800\x22", "null", "true", "NaN", "-1", "1e400", "65", "16384", "[]",
    "{}", "[[[[", r"\x22.*\x22", r"\x22(a)*\x22", "all-linear", "lm_head", "embed_tokens",
    "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "exclude_modules", "use_rslora", "init_lora_weights", "__metadata__", "BF16", "F16", "F32",
    "I8", "281474976710656", "lora_embedding_A", "lora_embedding_B", "base_layer.weight",
    "lora_A.weight", "lora_B.weight",
)  # fmt: skip
_LENGTH = struct.Struct("<I")


def main() -> int:
    """Fuzz for a while. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Fuzz the conversion of adapters.")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--corpus", type=Path, default=None)
    parser.add_argument("--model", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if find_spec("atheris") is None:
        sys.stderr.write("atheris is not installed: pip install atheris\n")
        return 2
    if arguments.model is not None:
        _fuzz(arguments.seconds, corpus=arguments.corpus, model=arguments.model)
        return 0
    # The fuzzer ends its process at once, so another one removes the files.
    with tempfile.TemporaryDirectory() as name:
        corpus = arguments.corpus or Path(name) / "corpus"
        options = {
            "--seconds": str(arguments.seconds),
            "--corpus": str(corpus),
            "--model": str(Path(name) / "model"),
        }
        flags = [text for option in options.items() for text in option]
        return subprocess.run(
            [sys.executable, "-m", "tests.fuzz.fuzz_adapters", *flags], check=False
        ).returncode


def _fuzz(seconds: int, *, corpus: Path, model: Path) -> None:
    """Does not return."""
    atheris: Any = import_module("atheris")
    # What is imported here is compiled so that the fuzzer sees which branches an input takes.
    with atheris.instrument_imports(include=list(_FUZZED)):
        checks = import_module("tests.support.adapter_checks")
    _write_corpus(corpus, checks)
    base = checks.tiny_base(model)

    def check_input(data: bytes) -> None:
        if len(data) >= _LENGTH.size:
            config_bytes = min(_LENGTH.unpack_from(data)[0], len(data) - _LENGTH.size)
            end = _LENGTH.size + config_bytes
            checks.check_files(data[_LENGTH.size : end], data[end:], base)

    words = model / "words"
    words.write_text("".join(f'"{word}"\n' for word in _WORDS), encoding="ascii")
    options = (f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}", f"-dict={words}")
    atheris.Setup([sys.argv[0], *options, str(corpus)], check_input)
    atheris.Fuzz()


def _write_corpus(corpus: Path, checks: Any) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for number, (config, weights) in enumerate(checks.seeds()):
        data = _LENGTH.pack(len(config)) + config + weights
        (corpus / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
