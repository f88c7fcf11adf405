"""Compiles the native step: `python -m services.worker.native.build [--optional]`.

One shared library lies beside its sources. Its name has a hash of them and of the compiler's
options: a library of other sources is never loaded, and one that is there need not be built again.
It is not tied to a Python version, because it is reached through ctypes.

Standard library only: a wheel's build runs this before anything else of the project is installed.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).resolve().parent
COMPILERS: Final = ("c++", "g++", "clang++")
COMPILE_OPTIONS: Final = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-c")
LINK_OPTIONS: Final = (
    "-shared",
    "-pthread",
    "-Wl,-z,defs",  # a symbol that is nowhere is an error of the build, not of a worker's start
    # The C++ runtime comes along, so that a wheel runs where there is another one, or none.
    "-static-libstdc++",
    "-static-libgcc",
)
_COMPILE_S_MAX: Final = 300.0
_SHOWN_LINES_MAX: Final = 20


class BuildError(Exception):
    """The library can't be built; the message says why."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


def library_path(folder: Path = FOLDER) -> Path:
    """Where the library of the sources of a folder lies, whether or not it is there."""
    digest = hashlib.sha256(" ".join([*COMPILE_OPTIONS, *LINK_OPTIONS]).encode())
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return folder / f"_step.{digest.hexdigest()[:16]}.so"


def find_compiler() -> list[str]:
    """The command of `$CXX` or the first compiler on the path. Raises NoCompilerError."""
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]) is None:
            raise NoCompilerError(f"there is no {command[0]}, which CXX asks for")
        return command
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise NoCompilerError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")


def build(folder: Path = FOLDER) -> Path:
    """The library, compiled unless it is there. Raises BuildError.

    What another build makes at the same time is the same file: each writes one of its own, and
    renames it.
    """
    path = library_path(folder)
    if path.is_file():
        return path
    sources = sorted(folder.glob("*.cpp"))
    if not sources:
        raise BuildError(f"there are no sources in {folder}")
    compiler = find_compiler()
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="_build.") as scratch:
            made = _compile(compiler, sources, Path(scratch))
            if library_path(folder) != path:
                raise BuildError("its sources changed meanwhile")
            made.replace(path)
    except OSError as error:
        raise BuildError(f"{folder} cannot hold it: {error}") from error
    _remove_others(path)
    return path


def _compile(compiler: Sequence[str], sources: Sequence[Path], scratch: Path) -> Path:
    """Each source by itself, as many at once as there are cores."""
    made = scratch / "step.so"
    objects = [str(scratch / f"{source.stem}.o") for source in sources]
    commands = [
        [*compiler, *COMPILE_OPTIONS, str(source), "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        list(threads.map(_run, commands))
    _run([*compiler, *LINK_OPTIONS, *objects, "-o", str(made)])
    return made


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_COMPILE_S_MAX
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()[:_SHOWN_LINES_MAX]
        raise BuildError("\n".join([f"{command[0]} failed with {result.returncode}:", *lines]))


def _remove_others(path: Path) -> None:
    """Libraries of other sources. A process that has loaded one keeps it."""
    for other in path.parent.glob("_step.*.so"):
        if other != path:
            other.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None, *, folder: Path = FOLDER) -> int:
    """Build and say so in a line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--optional", action="store_true", help="without a compiler, say so and succeed"
    )
    options = parser.parse_args(arguments)
    try:
        path = build(folder)
    except BuildError as error:
        sys.stderr.write(f"native step: not built, {error}\n")
        return 0 if options.optional and isinstance(error, NoCompilerError) else 1
    sys.stdout.write(f"native step: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
