"""The native step's library: when it is built, what it is called, and why there is none."""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from services.worker.native import library as native
from services.worker.native.build import (
    FOLDER,
    BuildError,
    NoCompilerError,
    build,
    find_compiler,
    library_path,
    main,
)
from services.worker.native.library import Library, NativeError, Unavailable, load

_ROOT = Path(__file__).resolve().parents[3]
_VISIBLE = '__attribute__((visibility("default")))'
_SOURCE = f'extern "C" {_VISIBLE} int answer() {{ return 42; }}\n'


def _has_compiler() -> bool:
    try:
        find_compiler()
    except NoCompilerError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="there is no C++ compiler")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.cpp").write_text(_SOURCE)
    (tmp_path / "two.cpp").write_text('#include "two.h"\nint two() { return TWO; }\n')
    (tmp_path / "two.h").write_text("#define TWO 2\n")
    return tmp_path


@pytest.fixture
def no_compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    monkeypatch.delenv("CXX", raising=False)


@needs_compiler
def test_the_sources_become_one_library(folder: Path) -> None:
    path = build(folder)
    assert path == library_path(folder)
    assert ctypes.CDLL(str(path)).answer() == 42
    assert {item.name for item in folder.iterdir()} == {"one.cpp", "two.cpp", "two.h", path.name}


@needs_compiler
def test_what_is_built_is_not_built_again(folder: Path) -> None:
    first = build(folder).stat()
    again = build(folder).stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


@needs_compiler
@pytest.mark.parametrize("changed", ["one.cpp", "two.h"])
def test_changed_sources_make_another_library_in_place_of_the_old(
    folder: Path, changed: str
) -> None:
    old = build(folder)
    with (folder / changed).open("a") as source:
        source.write("// a change\n")
    assert library_path(folder) != old
    new = build(folder)
    assert list(folder.glob("*.so")) == [new]


@needs_compiler
def test_a_source_that_does_not_compile_is_shown_and_leaves_nothing(folder: Path) -> None:
    (folder / "two.cpp").write_text("int two( { return 2; }\n")
    with pytest.raises(BuildError, match=r"two\.cpp:1:"):
        build(folder)
    assert {item.name for item in folder.iterdir()} == {"one.cpp", "two.cpp", "two.h"}


@needs_compiler
def test_a_function_that_is_nowhere_is_an_error_of_the_build(folder: Path) -> None:
    (folder / "two.cpp").write_text("int three();\nint two() { return three() - 1; }\n")
    with pytest.raises(BuildError, match="three"):
        build(folder)


@needs_compiler
def test_two_builds_at_once_do_not_disturb_each_other(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from services.worker.native.build import build;"
        " print(build(Path(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=_ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = {process.communicate(timeout=100)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert outputs == {str(library_path(folder))}
    assert ctypes.CDLL(outputs.pop()).answer() == 42


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_build_says_so(folder: Path) -> None:
    with pytest.raises(NoCompilerError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+"):
        build(folder)


def test_a_chosen_compiler_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(NoCompilerError, match="there is no no-such-compiler, which CXX asks for"):
        build(folder)


@pytest.mark.parametrize(("arguments", "code"), [([], 1), (["--optional"], 0)])
@pytest.mark.usefixtures("no_compiler")
def test_only_an_optional_build_succeeds_without_a_compiler(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    assert main(arguments, folder=folder) == code
    assert capsys.readouterr().err.startswith("native step: not built, there is no C++ compiler")


def test_an_optional_build_fails_with_sources_that_do_not_compile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert main(["--optional"], folder=folder) == 1


@needs_compiler
def test_the_python_structures_lie_in_memory_as_those_of_the_header(tmp_path: Path) -> None:
    structures = {
        "calumma_config": native.ModelShape,
        "calumma_segment": native.SegmentRows,
        "calumma_pass": native.PassRows,
        "calumma_scores": native.ScoreRows,
    }
    expected = [
        line
        for name, structure in structures.items()
        for line in [
            f"{name} {ctypes.sizeof(structure)}",
            *(
                f"{name}.{field[0]} {getattr(structure, field[0]).offset}"
                for field in structure._fields_
            ),
        ]
    ]
    prints = [
        line
        for name, structure in structures.items()
        for line in [
            f'printf("{name} %zu\\n", sizeof({name}));',
            *(
                f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));'
                for field in structure._fields_
            ),
        ]
    ]
    assert _printed(tmp_path, prints) == expected


@needs_compiler
def test_the_python_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    names: dict[str, int] = {"CALUMMA_ABI": native.ABI}
    for prefix, members in (("", native.Linear), ("NORM_", native.Norm), ("", native.Module)):
        names |= {f"CALUMMA_{prefix}{member.name}": member.value for member in members}
    prints = [f'printf("{name} %d\\n", (int){name});' for name in names]
    assert _printed(tmp_path, prints) == [f"{name} {value}" for name, value in names.items()]


def _printed(folder: Path, statements: list[str]) -> list[str]:
    body = "\n".join(statements)
    source = folder / "print.cpp"
    source.write_text(
        f'#include <cstdio>\n#include <cstddef>\n#include "{FOLDER}/step.h"\n'
        f"int main() {{\n{body}\n}}\n"
    )
    subprocess.run([*find_compiler(), str(source), "-o", str(folder / "print")], check=True)
    result = subprocess.run([folder / "print"], check=True, capture_output=True, text=True)
    return result.stdout.splitlines()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes `load` look for its library there."""

    def place(path: Path) -> None:
        monkeypatch.setattr(native, "library_path", lambda: path)

    return place


def test_a_library_that_is_not_built_is_a_reason(
    tmp_path: Path, place: Callable[[Path], None]
) -> None:
    place(tmp_path / "_step.0.so")
    assert load() == Unavailable("its library is not built; `make native` does that")


def test_a_file_that_is_no_library_is_a_reason(
    tmp_path: Path, place: Callable[[Path], None]
) -> None:
    path = tmp_path / "_step.0.so"
    path.write_bytes(b"not a library")
    place(path)
    found = load()
    assert isinstance(found, Unavailable)
    assert "_step.0.so" in found.reason


@needs_compiler
def test_a_library_of_something_else_is_a_reason(
    folder: Path, place: Callable[[Path], None]
) -> None:
    place(build(folder))
    found = load()
    assert isinstance(found, Unavailable)
    assert "has no calumma_isa" in found.reason


@needs_compiler
def test_a_cpu_without_the_instructions_is_a_reason(
    tmp_path: Path, place: Callable[[Path], None]
) -> None:
    stubs = "".join(f"{_VISIBLE} void *{name}() {{ return 0; }}\n" for name in native._SIGNATURES)
    (tmp_path / "stubs.cpp").write_text(f'extern "C" {{\n{stubs}}}\n')
    place(build(tmp_path))
    assert load() == Unavailable("this CPU lacks the instructions that it needs (AVX512 with BF16)")


@pytest.fixture(scope="module")
def library() -> Library:
    if not _has_compiler():
        pytest.skip("there is no C++ compiler")
    build()
    found = load()
    if isinstance(found, Unavailable):
        pytest.skip(found.reason)
    return found


def _shape(**changes: int) -> native.ModelShape:
    fields: dict[str, float] = {"layers": 1, "hidden": 64, "ffn": 64, "heads": 2, "kv_heads": 1}
    fields |= {"head_dim": 32, "vocab": 50, "block_tokens": 4, "max_positions": 8, "threads": 1}
    fields |= {"norm_eps": 1e-5}
    return native.ModelShape(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 33}, {"hidden": 0}, {"threads": 0}, {"kv_heads": 3}, {"head_dim": 512}],
    ids=str,
)
def test_a_shape_that_is_not_supported_is_refused_in_words(
    library: Library, changes: dict[str, int]
) -> None:
    with pytest.raises(NativeError, match=r"\w+ \w+"):
        native.NativeModel(library, _shape(**changes))


def test_another_version_of_the_interface_is_refused(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(NativeError):
        native.NativeModel(library, _shape())


@needs_compiler
@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_wheel_has_the_library_if_it_can_be_built(tmp_path: Path, *, has_compiler: bool) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "_step.*", "_build.*")
    for folder in ("services", "gen"):
        shutil.copytree(_ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(_ROOT / name, source)
    environment = {**os.environ, "CXX": "" if has_compiler else "no-such-compiler"}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        env=environment,
        check=True,
        capture_output=True,
        timeout=250,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folder = "services/worker/native"
    built = [name for name in names if name.endswith(".so")]
    assert built == ([f"{folder}/{library_path().name}"] if has_compiler else [])
    assert wheel.name.endswith("-py3-none-any.whl") is not has_compiler
    assert f"{folder}/step.h" in names
