"""The adapter store as commands call it, and the options that several of them have."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Final

import typer
from rich.text import Text

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.cli import output
from services.cli.adapter_shapes import AdapterShape
from services.cli.connect import dialled

VERSION_MAX: Final = 10**15 - 1
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS")]
ReferenceArgument = Annotated[str, typer.Argument(metavar="NAME[@VERSION]")]
LabelsOption = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label. Repeatable.")
]


@contextmanager
def store_of(ctx: typer.Context) -> Generator[adapter_store_pb2_grpc.AdapterStoreServiceStub]:
    """The stub. A failed call becomes a CommandError."""
    with dialled("adapter_store", output.session_of(ctx).addresses.adapter_store) as channel:
        yield adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)


def labels_of(texts: list[str] | None) -> dict[str, str]:
    """Labels from KEY=VALUE each; a value may have "=" in it."""
    labels: dict[str, str] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
        if key in labels:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--label")
        labels[key] = value
    return labels


def show_changed(adapter: adapter_store_pb2.Adapter, text: str, *, as_json: bool) -> None:
    """What a change made of an adapter."""
    if as_json:
        output.print_json(AdapterShape.of(adapter))
    else:
        output.stdout.print(Text(output.printable(text)))
