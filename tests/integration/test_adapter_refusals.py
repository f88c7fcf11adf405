"""What the adapter store refuses over real gRPC: each with its reason and field, and no effect."""

from pathlib import Path
from typing import Any

import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import write_tiny_model
from tests.support.store_suite import World, error_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, (tmp_path / "store").as_uri(), write_tiny_model(tmp_path / "model"))


def _small(world: World, seed: int = 0, **options: Any) -> Path:
    return world.adapter(seed, target_modules=("q_proj",), rank=2, **options)


LOOKALIKE = "\u0430dapter"  # its first letter is Cyrillic
NAMES = ["a/b", "../a", "..", "a,b", "a\0", "a" * 10_240, LOOKALIKE, "A", "a b", "", "a\n", ".a"]
LABELS = {f"k{n}": "v" for n in range(33)}
BAD_REQUESTS: dict[str, tuple[str, Any, Reason, str]] = {
    "canary -1": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="x", version=2, canary_percent=-1),
        Reason.INVALID_FIELD,
        "canary_percent",
    ),
    "canary 100": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="x", version=2, canary_percent=100),
        Reason.INVALID_FIELD,
        "canary_percent",
    ),
    "canary of no alias": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="none", version=2, canary_percent=5),
        Reason.ALIAS_NOT_FOUND,
        "adapter",
    ),
    "canary of the main version": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="x", version=1, canary_percent=5),
        Reason.INVALID_FIELD,
        "version",
    ),
    "canary of no version": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="x", version=9, canary_percent=5),
        Reason.ADAPTER_VERSION_NOT_FOUND,
        "adapter",
    ),
    "rollback of no alias": (
        "RollbackAlias",
        pb.RollbackAliasRequest(name="a", alias="none"),
        Reason.ALIAS_NOT_FOUND,
        "adapter",
    ),
    "rollback to nothing": (
        "RollbackAlias",
        pb.RollbackAliasRequest(name="a", alias="x"),
        Reason.ALIAS_HAS_NO_PREVIOUS,
        "alias",
    ),
    "visibility of nothing": (
        "SetVisibility",
        pb.SetVisibilityRequest(name="none", tenants=["t"]),
        Reason.ADAPTER_NOT_FOUND,
        "adapter",
    ),
    "bad tenant": (
        "SetVisibility",
        pb.SetVisibilityRequest(name="a", tenants=["a/b"]),
        Reason.INVALID_FIELD,
        "tenants",
    ),
    "many tenants": (
        "SetVisibility",
        pb.SetVisibilityRequest(name="a", tenants=[f"t{n}" for n in range(1001)]),
        Reason.FIELD_LIMIT_EXCEEDED,
        "tenants",
    ),
    "tenant of a get": (
        "Get",
        pb.GetRequest(adapter="a", tenant="t" * 65),
        Reason.INVALID_FIELD,
        "tenant",
    ),
    "tenant of a list": (
        "List",
        pb.ListRequest(tenant=LOOKALIKE),
        Reason.INVALID_FIELD,
        "tenant",
    ),
    "labels of a list": (
        "List",
        pb.ListRequest(labels=LABELS),
        Reason.FIELD_LIMIT_EXCEEDED,
        "labels",
    ),
    "digest of a list": (
        "List",
        pb.ListRequest(digest="sha256:x"),
        Reason.INVALID_FIELD,
        "digest",
    ),
    "pin without a reason": ("Pin", pb.PinRequest(adapter="a"), Reason.INVALID_FIELD, "reason"),
    "pin with a long reason": (
        "Pin",
        pb.PinRequest(adapter="a", reason="x" * 257),
        Reason.FIELD_LIMIT_EXCEEDED,
        "reason",
    ),
    "pin with escapes": (
        "Pin",
        pb.PinRequest(adapter="a", reason="\x1b[2J"),
        Reason.INVALID_FIELD,
        "reason",
    ),
    "pin of nothing": (
        "Pin",
        pb.PinRequest(adapter="none", reason="x"),
        Reason.ADAPTER_NOT_FOUND,
        "adapter",
    ),
    "pin of no version": (
        "Pin",
        pb.PinRequest(adapter="a@9", reason="x"),
        Reason.ADAPTER_VERSION_NOT_FOUND,
        "adapter",
    ),
    "unpin of what is not pinned": (
        "Unpin",
        pb.UnpinRequest(adapter="a"),
        Reason.PIN_NOT_FOUND,
        "adapter",
    ),
}


async def test_bad_requests_get_their_reason_and_change_nothing(world: World) -> None:
    async with world.replica() as client:
        for seed in range(2):
            await client.publish(_small(world, seed))
        await client.stub.SetAlias(pb.SetAliasRequest(name="a", alias="x", version=1))
        before = (await client.stub.Get(pb.GetRequest(adapter="a"))).adapter
        for what, (method, request, reason, field) in BAD_REQUESTS.items():
            error = await error_of(getattr(client.stub, method)(request, timeout=5))
            assert (error.reason, error.context.field) == (reason, field), what
        assert (await client.stub.Get(pb.GetRequest(adapter="a"))).adapter == before


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:16])
async def test_a_bad_name_is_refused_everywhere(world: World, name: str) -> None:
    async with world.replica() as client:
        stub = client.stub
        calls = [
            client.publish(_small(world), name),
            stub.Get(pb.GetRequest(adapter=name)),
            stub.Delete(pb.DeleteRequest(adapter=name)),
            stub.SetAlias(pb.SetAliasRequest(name=name, alias="x", version=1)),
            stub.SetAlias(pb.SetAliasRequest(name="a", alias=name, version=1)),
            stub.RollbackAlias(pb.RollbackAliasRequest(name=name, alias="x")),
            stub.RollbackAlias(pb.RollbackAliasRequest(name="a", alias=name)),
            stub.DeleteAlias(pb.DeleteAliasRequest(name=name, alias="x")),
            stub.SetVisibility(pb.SetVisibilityRequest(name=name)),
            stub.Pin(pb.PinRequest(adapter=name, reason="x")),
            stub.Unpin(pb.UnpinRequest(adapter=name)),
        ]
        refused: list[RpcError] = [await error_of(call) for call in calls]
        alias_only = name in {"..", ".a"}  # an alias may begin with a dot, a name may not
        expected = Reason.ADAPTER_NOT_FOUND if alias_only else Reason.INVALID_FIELD
        for position, error in enumerate(refused):
            reason = expected if position in {4, 6} else Reason.INVALID_FIELD
            assert error.reason is reason, position
        assert not await world.storage.list("registry")
