"""`calumma adapters …`: publish and find adapters, and the names of all other commands on them."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.cli import adapter_changes, output, unload
from services.cli.adapter_shapes import AdapterShape, PublishShape, VersionShape
from services.cli.connect import CALL_TIMEOUT_S
from services.cli.store import (
    VERSION_MAX,
    LabelsOption,
    ReferenceArgument,
    labels_of,
    store_of,
)

FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
PUBLISH_TIMEOUT_S: Final = 600.0
_CHUNK_BYTES = 2**19
_PAGE_SIZE = 1000

app = typer.Typer(help="Publish, find, name and delete adapters.", no_args_is_help=True)


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
    version: Annotated[
        int, typer.Option(min=0, max=VERSION_MAX, help="Number that it must get. 0: the next one.")
    ] = 0,
    label: LabelsOption = None,
    source: Annotated[str, typer.Option(help="Where it comes from, for example a URL.")] = "",
    tenant: Annotated[
        list[str] | None,
        typer.Option(help="Tenant that may use a new adapter. Repeatable; none: all may."),
    ] = None,
    publisher: Annotated[str, typer.Option(help="Tenant that publishes it.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Upload a PEFT folder as the next version of NAME.

    The same weights under the same name are recognised and make no new version.
    """
    metadata = adapter_store_pb2.PublishMetadata(
        name=name,
        dry_run=dry_run,
        aliases=alias or [],
        version=version,
        labels=labels_of(label),
        source=source,
        tenants=tenant or [],
        tenant=publisher,
    )
    size_bytes = folder_bytes(folder)
    with output.byte_progress(f"publishing {name}") as progress, store_of(ctx) as store:
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
    label: LabelsOption = None,
    base_model: Annotated[str, typer.Option(help="Only those trained on this model.")] = "",
    digest: Annotated[str, typer.Option(help="Only those with these weights.")] = "",
    tenant: Annotated[str, typer.Option(help="Only what this tenant may use.")] = "",
    as_json: output.JsonFlag = False,
) -> None:
    """List what is published, by name. An adapter is listed when one of its versions fits."""
    request = adapter_store_pb2.ListRequest(
        name_prefix=prefix,
        labels=labels_of(label),
        base_model=base_model,
        digest=digest,
        tenant=tenant,
    )
    with store_of(ctx) as store:
        shapes = [AdapterShape.of(adapter) for adapter in all_adapters(store, request)]
    if as_json:
        output.print_json({"adapters": [asdict(shape) for shape in shapes]})
        return
    table = output.table("adapter", "versions", "aliases", "rank", "size", "modules", "published")
    for shape in shapes:
        latest = shape.versions[-1]
        table.add_row(
            Text(shape.name, style="bold"),
            str(len(shape.versions)),
            Text(_aliases_text(shape)),
            str(latest.rank),
            output.size_text(latest.size_bytes),
            output.modules_text(latest.target_modules),
            output.age_text(latest.created),
        )
    output.stdout.print(table)


@app.command("show")
def show(
    ctx: typer.Context,
    reference: ReferenceArgument,
    *,
    tenant: Annotated[str, typer.Option(help="As this tenant may see it.")] = "",
    as_json: output.JsonFlag = False,
) -> None:
    """Show an adapter with all its versions; the resolved one is marked."""
    with store_of(ctx) as store:
        request = adapter_store_pb2.GetRequest(adapter=reference, tenant=tenant)
        response = store.Get(request, timeout=CALL_TIMEOUT_S)
    shape = AdapterShape.of(response.adapter)
    resolved = response.version.ref.version
    if as_json:
        output.print_json({"resolved_version": resolved, **asdict(shape)})
        return
    _show_adapter(shape, resolved)


app.command("alias")(adapter_changes.set_alias)
app.command("rollback")(adapter_changes.roll_back)
app.command("unalias")(adapter_changes.delete_alias)
app.command("visibility")(adapter_changes.set_visibility)
app.command("pin")(adapter_changes.pin)
app.command("unpin")(adapter_changes.unpin)
app.command("delete")(unload.delete)
app.command("unload")(unload.unload)


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
    store: adapter_store_pb2_grpc.AdapterStoreServiceStub,
    wanted: adapter_store_pb2.ListRequest | None = None,
) -> Iterator[adapter_store_pb2.Adapter]:
    """Every page of List."""
    request = adapter_store_pb2.ListRequest(page_size=_PAGE_SIZE)
    request.MergeFrom(wanted or adapter_store_pb2.ListRequest())
    while True:
        page = store.List(request, timeout=CALL_TIMEOUT_S)
        yield from page.adapters
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _show_adapter(shape: AdapterShape, resolved: int) -> None:
    output.stdout.print(Text(shape.name, style="bold"), f"revision {shape.revision}")
    output.stdout.print(Text(f"aliases: {_aliases_text(shape) or 'none'}"))
    if shape.previous_versions:
        previous = output.aliases_text(shape.previous_versions)
        output.stdout.print(Text(f"before: {previous}"))
    output.stdout.print(Text(f"tenants: {', '.join(shape.tenants) or 'all'}"))
    for pin in shape.pins:
        what = f"@{pin.selector}" if pin.selector else "newest"
        text = output.printable(pin.reason)
        output.stdout.print(Text(f"pinned: {what}, {output.age_text(pin.created)}: {text}"))
    table = output.table(
        "version", "digest", "rank", "dtype", "size", "modules", "published", "labels", "source"
    )
    for version in shape.versions:
        origin = version.provenance
        by = f"by {origin.publisher}" if origin.publisher else ""
        source = " ".join(part for part in (origin.source, by) if part)
        table.add_row(
            f"{version.version} ←" if version.version == resolved else str(version.version),
            output.short_digest(version.digest),
            str(version.rank),
            version.dtype,
            output.size_text(version.size_bytes),
            output.modules_text(version.target_modules),
            output.age_text(version.created),
            Text(output.printable(_labels_text(version))),
            Text(output.printable(source)),
        )
    output.stdout.print(table)


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
    table = output.table("module", "modules", "tensors", "rank", "scale")
    for (module, rank, scale), count in _grouped(shape).items():
        table.add_row(Text(module), str(count), str(2 * count), str(rank), f"{scale:g}")
    output.stdout.print(table)


def _grouped(shape: PublishShape) -> Counter[tuple[str, int, float]]:
    """How many layers bind each kind of module alike; a row per layer would hide the pattern."""
    return Counter(
        (binding.module.rpartition(".")[2], binding.rank, binding.scale)
        for binding in shape.bindings
    )


def _aliases_text(shape: AdapterShape) -> str:
    """For example "stable→3 (5 % →4)"."""
    return ", ".join(
        f"{alias}→{version}"
        + (f" ({canary.percent} % →{canary.version})" if canary is not None else "")
        for alias, version in shape.aliases.items()
        for canary in (shape.canaries.get(alias),)
    )


def _labels_text(version: VersionShape) -> str:
    return " ".join(f"{key}={value}" for key, value in version.labels.items())
