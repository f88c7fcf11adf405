"""No service can unpickle: a pickle runs its author's code, and uploads come from anybody."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

SERVICES: Final = Path(__file__).parents[3] / "services"
MODULES: Final = frozenset(
    {"pickle", "_pickle", "pickletools", "cPickle", "cloudpickle", "dill", "joblib", "marshal",
     "shelve", "jsonpickle", "pandas", "hickle"}
)  # fmt: skip
# Functions that unpickle, or that run text, by their full names.
FUNCTIONS: Final = frozenset(
    {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
     "torch.serialization.load", "numpy.load", "numpy.lib.npyio.load", "yaml.load",
     "numpy.lib.format.read_array", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
     "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.__import__"}
)  # fmt: skip
IMPORT: Final = "importlib.import_module"  # lawful with a name that can be read here


def _offences(source: str) -> Iterator[str]:
    """What a module imports or calls that it must not, by full name."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    for full_name in names.values():
        if full_name.partition(".")[0] in MODULES or full_name in FUNCTIONS:
            yield full_name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            full_name = _full_name(node, names)
            if full_name in FUNCTIONS:
                yield full_name
        if isinstance(node, ast.Call) and _full_name(node.func, names) == IMPORT:
            match node.args:
                case [ast.Constant(str(module))] if module.partition(".")[0] not in MODULES:
                    pass
                case _:
                    yield IMPORT


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that an import binds, with what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield item.asname or item.name, item.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for item in node.names:
                yield item.asname or item.name, f"{node.module}.{item.name}"


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """ "torch.load" for `t.load` after `import torch as t`; "" for what is not a plain name."""
    match node:
        case ast.Name():
            return names.get(node.id, node.id)
        case ast.Attribute():
            return f"{_full_name(node.value, names)}.{node.attr}"
        case _:
            return ""


@pytest.mark.parametrize(
    "path", sorted(SERVICES.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICES))
)
def test_a_service_does_not_unpickle(path: Path) -> None:
    assert list(_offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch as t\nread = t.load",
        "from torch import load",
        "def later():\n    import shelve as s",
        "import numpy as np\nnp.load(path)",
        "import marshal\nmarshal.loads(b'')",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module as load\nload(name)",
        "__import__('pickle')",
        "eval(text)",
        "import torch.jit\ntorch.jit.load(path)",
    ],
)
def test_the_law_sees_each_way_to_unpickle(source: str) -> None:
    assert list(_offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(file)",
        "import torch\nmodel.eval()",
        "import re\nre.compile('')",
        "import importlib\nimportlib.import_module('readline')",
    ],
)
def test_the_law_lets_other_things_be(source: str) -> None:
    assert list(_offences(source)) == []
