"""`calumma adapters delete` and `unload`: what is gone from the store is taken from workers too.

Deleting is the store's and is done when the store has answered. Memory is the workers': the
scheduler waits for the requests that use an adapter, has it dropped, and says when reports of the
workers lack it. A scheduler that can't be asked costs memory that is freed by eviction, later.
"""

import math
import sys
from typing import Annotated, Final

import typer
from google.protobuf import duration_pb2
from rich.text import Text

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.cli import output
from services.cli.adapter_shapes import DeleteShape, UnloadShape
from services.cli.connect import CALL_TIMEOUT_S, dialled
from services.cli.store import ReferenceArgument, store_of

GRACE_S_MAX: Final = 600.0
GraceOption = Annotated[
    float,
    typer.Option(
        "--grace", metavar="SECONDS", min=0, max=GRACE_S_MAX, help="How long to wait for its users."
    ),
]


def delete(
    ctx: typer.Context,
    reference: ReferenceArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    drain: Annotated[bool, typer.Option(help="Free the memory of workers, too.")] = True,
    grace_s: GraceOption = 30.0,
    as_json: output.JsonFlag = False,
) -> None:
    """Delete one version, or the adapter with all its versions and aliases."""
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("needed where nobody can be asked", param_hint="--yes")
        typer.confirm(f"Delete {reference}?", abort=True, err=True)
    with store_of(ctx) as store:
        digests = _digests_of(store, reference)
        request = adapter_store_pb2.DeleteRequest(adapter=reference)
        store.Delete(request, timeout=CALL_TIMEOUT_S)
        digests = [digest for digest in digests if not _is_named(store, digest)]
    unloaded = UnloadShape()
    if drain and digests:
        try:
            unloaded = _unload(ctx, digests, grace_s=grace_s)
        except output.CommandError as error:
            output.note(f"not taken from workers: {error}")
            unloaded = UnloadShape(failure=str(error))
    if as_json:
        output.print_json(DeleteShape(reference, tuple(digests), unloaded))
        return
    output.stdout.print(Text(f"{reference} is deleted"))
    if not unloaded.failure:
        _show_unloaded(unloaded)


def unload(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]|DIGEST")],
    *,
    grace_s: GraceOption = 30.0,
    as_json: output.JsonFlag = False,
) -> None:
    """Free an adapter's memory at every worker once no request uses it; it stays published."""
    if reference.startswith("sha256:"):
        digest = reference
    else:
        with store_of(ctx) as store:
            request = adapter_store_pb2.GetRequest(adapter=reference)
            digest = store.Get(request, timeout=CALL_TIMEOUT_S).version.ref.digest
    unloaded = _unload(ctx, [digest], grace_s=grace_s)
    if unloaded.holding_workers:
        raise output.CommandError(
            f"{reference} is still held by {', '.join(unloaded.holding_workers)}",
            hint="requests use it; a longer --grace waits for them",
        )
    if as_json:
        output.print_json(unloaded)
    else:
        _show_unloaded(unloaded)


def _unload(ctx: typer.Context, digests: list[str], *, grace_s: float) -> UnloadShape:
    """One after the other. Raises CommandError when the scheduler can't be asked."""
    grace = duration_pb2.Duration()
    grace.FromNanoseconds(math.ceil(grace_s * 1e9))
    freed_bytes = 0
    unloaded: set[str] = set()
    holding: set[str] = set()
    with dialled("scheduler", output.session_of(ctx).addresses.scheduler) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        for digest in digests:
            request = scheduler_pb2.UnloadAdapterRequest(digest=digest, grace=grace)
            response = stub.UnloadAdapter(request, timeout=grace_s + CALL_TIMEOUT_S)
            freed_bytes += response.freed_bytes
            unloaded.update(response.unloaded_workers)
            holding.update(response.holding_workers)
    return UnloadShape(freed_bytes, tuple(sorted(unloaded)), tuple(sorted(holding)))


def _digests_of(store: adapter_store_pb2_grpc.AdapterStoreServiceStub, reference: str) -> list[str]:
    """What deleting this reference takes away."""
    request = adapter_store_pb2.GetRequest(adapter=reference)
    response = store.Get(request, timeout=CALL_TIMEOUT_S)
    if "@" in reference:
        return [response.version.ref.digest]
    return [version.ref.digest for version in response.adapter.versions]


def _is_named(store: adapter_store_pb2_grpc.AdapterStoreServiceStub, digest: str) -> bool:
    """Whether some adapter still has a version of this digest."""
    request = adapter_store_pb2.ListRequest(digest=digest, page_size=1)
    while True:
        page = store.List(request, timeout=CALL_TIMEOUT_S)
        if page.adapters or not page.next_page_token:
            return bool(page.adapters)
        request.page_token = page.next_page_token


def _show_unloaded(unloaded: UnloadShape) -> None:
    workers = len(unloaded.unloaded_workers)
    if workers:
        size = output.size_text(unloaded.freed_bytes)
        output.stdout.print(Text(f"{size} freed at {workers} worker{'s' if workers > 1 else ''}"))
    else:
        output.stdout.print("no worker held it")
    if unloaded.holding_workers:
        output.note(f"still held by {', '.join(unloaded.holding_workers)}: requests use it")
