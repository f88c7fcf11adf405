"""Many first requests at once for one adapter that only S3 has."""

import asyncio
import statistics
from dataclasses import dataclass
from typing import Final

from bench.coldstart.client import Client
from bench.report import Row
from bench.suite import Event, LoggedProcess

_PROMPT_TOKENS: Final = 8
_LOG_S_MAX: Final = 30.0
_SETTLE_S: Final = 0.5  # for the log line of a second download, if there was one


@dataclass(frozen=True, slots=True)
class CrowdResult:
    """How the crowd fared. `downloads`: of the adapter, as the store logged them."""

    requests: int
    downloads: int
    ttft_p50_s: float
    ttft_max_s: float

    def row(self) -> Row:
        return {
            "first_requests_at_once": self.requests,
            "downloads": self.downloads,
            "ttft_p50_s": self.ttft_p50_s,
            "ttft_max_s": self.ttft_max_s,
        }


async def ask_all_at_once(
    log: LoggedProcess, client: Client, name: str, digest: str, *, count: int
) -> CrowdResult:
    """Send `count` requests for an adapter that nobody has asked for."""
    begin = len(log.events)
    answers = await asyncio.gather(
        *(client.ask(name, prompt_tokens=_PROMPT_TOKENS, max_tokens=1) for _ in range(count))
    )

    def is_download(event: Event) -> bool:
        method = str(event.get("method", ""))
        return method.endswith("/Download") and event.get("digest") == digest

    await asyncio.to_thread(log.wait_for, is_download, _LOG_S_MAX, after=begin)
    await asyncio.sleep(_SETTLE_S)
    ttft_s = [answer.ttft_s for answer in answers]
    downloads = sum(is_download(event) for event in log.events[begin:])
    return CrowdResult(count, downloads, statistics.median(ttft_s), max(ttft_s))
