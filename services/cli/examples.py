"""The adapters that `calumma up` publishes: where they lie, and a prompt for each to try."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from services.cli.adapters import FILES

SCORES_FILE: Final = "scores.json"  # beside the example adapters: their measured accuracy
_CHECKOUT = Path(__file__).parents[2]
_PROMPT_CHARACTERS_MAX = 120  # a command to try should fit a line or two
_ADAPTERS_MAX = 1000


def find_examples(folder: Path | None) -> dict[str, Path]:
    """Adapter folders by name, sorted. Empty when there are none, as in an installed wheel."""
    root = folder or _CHECKOUT / "examples" / "adapters"
    if not root.is_dir():
        return {}
    found = sorted(path for path in root.iterdir() if all((path / f).is_file() for f in FILES))
    return {path.name: path for path in found[:_ADAPTERS_MAX]}


def sample_prompts(names: Iterable[str], folders: Mapping[str, Path]) -> dict[str, str]:
    """A prompt that shows the adapter's job, where the scores beside it name a short one.

    Those that are right most often come first.
    """
    prompts: dict[str, str] = {}
    shares: dict[str, float] = {}
    for name in names:
        scores = _scores(folders[name].parent / SCORES_FILE)
        entry: Any = scores.get(name)
        if not isinstance(entry, dict):
            continue
        prompt, share = entry.get("sample_prompt"), entry.get("adapter")
        if isinstance(prompt, str) and len(prompt) <= _PROMPT_CHARACTERS_MAX and "\n" not in prompt:
            prompts[name] = prompt
            shares[name] = share if isinstance(share, float) else 0.0
    return {name: prompts[name] for name in sorted(prompts, key=lambda n: -shares[n])}


def _scores(path: Path) -> Mapping[str, Any]:
    try:
        scores = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return scores if isinstance(scores, dict) else {}
