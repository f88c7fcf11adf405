"""`calumma adapters …`: publish, find, name and delete adapters in the adapter store."""

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.cli import output
from services.cli.connect import CALL_TIMEOUT_S, dialled
from services.cli.shapes import AdapterShape, PublishShape

FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
PUBLISH_TIMEOUT_S: Final = 600.0
_CHUNK_BYTES = 2**19
_PAGE_SIZE = 1000

app = typer.Typer(help="Publish, find, name and delete adapters.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
ReferenceArgument = Annotated[str, typer.Argument(metavar="NAME[@VERSION]")]


@app.command("publish")
def publish(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A PEFT folder.")
    ],
    name: Annotated[str, typer.Option(help="What to register it as.")],
    *,
    alias: Annotated[
        list[str] | None, typer.Option(help="Alias for the new version. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Upload a PEFT folder as the next version of NAME.

    The same weights under the same name are recognised and make no new version.
    """
    metadata = adapter_store_pb2.PublishMetadata(name=name, dry_run=dry_run, aliases=alias or [])
    size_bytes = folder_bytes(folder)
    with output.byte_progress(f"publishing {name}") as progress, _store(ctx) as store:
        progress.expect(size_bytes)
        requests = publish_requests(folder, metadata, on_sent=progress.advance)
        response = store.Publish(requests, timeout=PUBLISH_TIMEOUT_S)
    shape = PublishShape.of(response, dry_run=dry_run)
    if as_json:
        output.print_json(shape)
    else:
        _show_published(shape)


@app.command("list")
def list_adapters(
    ctx: typer.Context,
    *,
    prefix: Annotated[str, typer.Option(help="Only names that begin with this.")] = "",
    as_json: output.JsonFlag = False,
) -> None:
    """List what is published, by name."""
    with _store(ctx) as store:
        shapes = [AdapterShape.of(adapter) for adapter in all_adapters(store, prefix=prefix)]
    if as_json:
        output.print_json({"adapters": [asdict(shape) for shape in shapes]})
        return
    table = output.table("adapter", "versions", "aliases", "rank", "size", "modules", "published")
    for shape in shapes:
        latest = shape.versions[-1]
        table.add_row(
            Text(shape.name, style="bold"),
            str(len(shape.versions)),
            output.aliases_text(shape.aliases),
            str(latest.rank),
            output.size_text(latest.size_bytes),
            output.modules_text(latest.target_modules),
            output.age_text(latest.created),
        )
    output.stdout.print(table)


@app.command("show")
def show(
    ctx: typer.Context, reference: ReferenceArgument, *, as_json: output.JsonFlag = False
) -> None:
    """Show an adapter with all its versions; the resolved one is marked."""
    with _store(ctx) as store:
        request = adapter_store_pb2.GetRequest(adapter=reference)
        response = store.Get(request, timeout=CALL_TIMEOUT_S)
    shape = AdapterShape.of(response.adapter)
    resolved = response.version.ref.version
    if as_json:
        output.print_json({"resolved_version": resolved, **asdict(shape)})
        return
    output.stdout.print(Text(shape.name, style="bold"), f"revision {shape.revision}")
    output.stdout.print("aliases:", output.aliases_text(shape.aliases) or "none")
    table = output.table("version", "digest", "rank", "dtype", "size", "modules", "published")
    for version in shape.versions:
        table.add_row(
            f"{version.version} ←" if version.version == resolved else str(version.version),
            output.short_digest(version.digest),
            str(version.rank),
            version.dtype,
            output.size_text(version.size_bytes),
            output.modules_text(version.target_modules),
            output.age_text(version.created),
        )
    output.stdout.print(table)


@app.command("alias")
def set_alias(
    ctx: typer.Context,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, max=2**63 - 1)],
    *,
    as_json: output.JsonFlag = False,
) -> None:
    """Point ALIAS of NAME at VERSION."""
    request = adapter_store_pb2.SetAliasRequest(name=name, alias=alias, version=version)
    with _store(ctx) as store:
        response = store.SetAlias(request, timeout=CALL_TIMEOUT_S)
    _show_changed(response.adapter, f"{name}@{alias} is version {version}", as_json=as_json)


@app.command("unalias")
def delete_alias(
    ctx: typer.Context,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    *,
    as_json: output.JsonFlag = False,
) -> None:
    """Remove ALIAS from NAME; its version stays."""
    request = adapter_store_pb2.DeleteAliasRequest(name=name, alias=alias)
    with _store(ctx) as store:
        response = store.DeleteAlias(request, timeout=CALL_TIMEOUT_S)
    _show_changed(response.adapter, f"{name}@{alias} is gone", as_json=as_json)


@app.command("delete")
def delete(
    ctx: typer.Context,
    reference: ReferenceArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Delete one version, or the adapter with all its versions and aliases."""
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("needed where nobody can be asked", param_hint="--yes")
        typer.confirm(f"Delete {reference}?", abort=True, err=True)
    with _store(ctx) as store:
        request = adapter_store_pb2.DeleteRequest(adapter=reference)
        store.Delete(request, timeout=CALL_TIMEOUT_S)
    if as_json:
        output.print_json({"deleted": reference})
    else:
        output.stdout.print(Text(f"{reference} is deleted"))


def publish_requests(
    folder: Path,
    metadata: adapter_store_pb2.PublishMetadata,
    *,
    on_sent: Callable[[int], None],
) -> Iterator[adapter_store_pb2.PublishRequest]:
    """The messages of one Publish call. `on_sent` gets the bytes of each chunk."""
    yield adapter_store_pb2.PublishRequest(metadata=metadata)
    for name in FILES:
        with (folder / name).open("rb") as stream:
            while data := stream.read(_CHUNK_BYTES):
                chunk = adapter_store_pb2.FileChunk(file=name, data=data)
                yield adapter_store_pb2.PublishRequest(chunk=chunk)
                on_sent(len(data))


def folder_bytes(folder: Path) -> int:
    """What publishing this folder sends. Raises CommandError when it is no adapter."""
    for name in FILES:
        if not (folder / name).is_file():
            hint = f"a PEFT adapter folder has {FILES[0]} and {FILES[1]}"
            raise output.CommandError(f"{folder} has no {name}", hint=hint)
    return sum((folder / name).stat().st_size for name in FILES)


def all_adapters(
    store: adapter_store_pb2_grpc.AdapterStoreServiceStub, *, prefix: str = ""
) -> Iterator[adapter_store_pb2.Adapter]:
    """Every page of List."""
    request = adapter_store_pb2.ListRequest(page_size=_PAGE_SIZE, name_prefix=prefix)
    while True:
        page = store.List(request, timeout=CALL_TIMEOUT_S)
        yield from page.adapters
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


@contextmanager
def _store(ctx: typer.Context) -> Generator[adapter_store_pb2_grpc.AdapterStoreServiceStub]:
    with dialled("adapter_store", output.session_of(ctx).addresses.adapter_store) as channel:
        yield adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)


def _show_published(shape: PublishShape) -> None:
    version = shape.version
    if shape.dry_run:
        headline = f"{version.name} can be published"
    elif shape.already_published:
        headline = f"{version.name}@{version.version} has these weights already"
    else:
        headline = f"{version.name}@{version.version} is published"
    output.stdout.print(Text(headline, style="bold green"))
    digest = output.short_digest(version.digest)
    facts = f"{digest} · rank {version.rank} · {output.size_text(version.size_bytes)}"
    output.stdout.print(Text(f"{facts} · {version.parameters:,} parameters"))
    table = output.table("module", "modules", "rank", "scale")
    for (module, rank, scale), count in _grouped(shape).items():
        table.add_row(Text(module), str(count), str(rank), f"{scale:g}")
    output.stdout.print(table)


def _grouped(shape: PublishShape) -> Counter[tuple[str, int, float]]:
    """How many layers bind each kind of module alike; a row per layer would hide the pattern."""
    return Counter(
        (binding.module.rpartition(".")[2], binding.rank, binding.scale)
        for binding in shape.bindings
    )


def _show_changed(adapter: adapter_store_pb2.Adapter, text: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json(AdapterShape.of(adapter))
    else:
        output.stdout.print(Text(text))
