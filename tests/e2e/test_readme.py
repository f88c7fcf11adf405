"""README's Python client runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.suite import Suite

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]


def test_the_python_client_of_the_readme_gets_an_answer(suite: Suite) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "127.0.0.1:7100" in code

    ran = subprocess.run(
        [sys.executable, "-c", code.replace("127.0.0.1:7100", suite.gateway)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT / "gen",
    )

    assert ran.stdout in {"positive", "negative", "mixed"}
