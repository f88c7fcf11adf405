"""Tasks that live as long as the gateway: one that fails ends the process, which is restarted."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger("tasks")


def start_task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run until cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(_check)
    return task


def _check(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("task_failed", task=task.get_coro(), exc_info=error)
        sys.exit(1)
