"""`calumma adapters …` that change what a name means, who may use it and what workers keep."""

from typing import Annotated

import typer

from calumma.adapter_store.v1 import adapter_store_pb2
from services.cli import output
from services.cli.connect import CALL_TIMEOUT_S
from services.cli.store import (
    VERSION_MAX,
    AliasArgument,
    NameArgument,
    show_changed,
    store_of,
)

PinArgument = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]")]


def set_alias(
    ctx: typer.Context,
    name: NameArgument,
    alias: AliasArgument,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, max=VERSION_MAX)],
    *,
    canary: Annotated[
        int | None,
        typer.Option(metavar="PERCENT", min=1, max=99, help="Only this share of its requests."),
    ] = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Point ALIAS of NAME at VERSION, or a part of its requests."""
    request = adapter_store_pb2.SetAliasRequest(
        name=name, alias=alias, version=version, canary_percent=canary or 0
    )
    with store_of(ctx) as store:
        response = store.SetAlias(request, timeout=CALL_TIMEOUT_S)
    share = f" for {canary} % of its requests" if canary else ""
    show_changed(response.adapter, f"{name}@{alias} is version {version}{share}", as_json=as_json)


def roll_back(
    ctx: typer.Context,
    name: NameArgument,
    alias: AliasArgument,
    *,
    as_json: output.JsonFlag = False,
) -> None:
    """End the canary of ALIAS; without one, point it at the version that it had before."""
    request = adapter_store_pb2.RollbackAliasRequest(name=name, alias=alias)
    with store_of(ctx) as store:
        response = store.RollbackAlias(request, timeout=CALL_TIMEOUT_S)
    version = response.adapter.aliases[alias]
    text = f"{name}@{alias} is version {version} for all of its requests"
    show_changed(response.adapter, text, as_json=as_json)


def delete_alias(
    ctx: typer.Context,
    name: NameArgument,
    alias: AliasArgument,
    *,
    as_json: output.JsonFlag = False,
) -> None:
    """Remove ALIAS from NAME; its version stays."""
    request = adapter_store_pb2.DeleteAliasRequest(name=name, alias=alias)
    with store_of(ctx) as store:
        response = store.DeleteAlias(request, timeout=CALL_TIMEOUT_S)
    show_changed(response.adapter, f"{name}@{alias} is gone", as_json=as_json)


def set_visibility(
    ctx: typer.Context,
    name: NameArgument,
    *,
    tenant: Annotated[
        list[str] | None, typer.Option(help="Tenant that may use it. Repeatable.")
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All tenants may.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Say which tenants may use NAME; for all others it does not exist."""
    tenants = tenant or []
    if bool(tenants) == everyone:
        raise typer.BadParameter("give either tenants or --all", param_hint="--tenant")
    request = adapter_store_pb2.SetVisibilityRequest(name=name, tenants=tenants)
    with store_of(ctx) as store:
        response = store.SetVisibility(request, timeout=CALL_TIMEOUT_S)
    text = f"{name} is for {', '.join(response.adapter.tenants) or 'all tenants'}"
    show_changed(response.adapter, text, as_json=as_json)


def pin(
    ctx: typer.Context,
    reference: PinArgument,
    reason: Annotated[str, typer.Option(help="Why, for whoever finds it.")],
    *,
    as_json: output.JsonFlag = False,
) -> None:
    """Have every worker keep an adapter in device memory. A pin of an alias follows it."""
    request = adapter_store_pb2.PinRequest(adapter=reference, reason=reason)
    with store_of(ctx) as store:
        response = store.Pin(request, timeout=CALL_TIMEOUT_S)
    show_changed(response.adapter, f"{reference} is pinned", as_json=as_json)


def unpin(ctx: typer.Context, reference: PinArgument, *, as_json: output.JsonFlag = False) -> None:
    """Let workers evict an adapter again."""
    request = adapter_store_pb2.UnpinRequest(adapter=reference)
    with store_of(ctx) as store:
        response = store.Unpin(request, timeout=CALL_TIMEOUT_S)
    show_changed(response.adapter, f"{reference} is not pinned any more", as_json=as_json)
