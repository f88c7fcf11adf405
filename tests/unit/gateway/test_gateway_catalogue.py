"""What a name means for one request of one tenant, and what the catalogue costs."""

import time
import tracemalloc

import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.common.v1 import common_pb2
from services.common.errors import Reason, RpcError
from services.gateway import wire
from services.gateway.catalogue import UNPACKED_MAX, Catalogue
from services.gateway.parse import adapter_name
from services.gateway.types import AdapterRef

REQUESTS = 20_000


def adapter(name: str = "poet", *, versions: int = 3, **fields: object) -> pb.Adapter:
    return pb.Adapter(
        name=name,
        revision=7,
        versions=[
            pb.AdapterVersion(
                ref=common_pb2.AdapterRef(
                    digest=f"sha256:{hash((name, number)) & (2**256 - 1):064x}",
                    name=name,
                    version=number,
                    rank=8,
                    size_bytes=1000 + number,
                ),
                target_modules=["q_proj", "v_proj"],
                base_model="base",
                labels={"team": "search"},
                provenance=pb.Provenance(config_sha256="0" * 64, weights_sha256="1" * 64),
            )
            for number in range(1, versions + 1)
        ],
        **fields,  # type: ignore[arg-type]  # any field of it
    )


def catalogue(*adapters: pb.Adapter) -> Catalogue:
    made = Catalogue()
    for one in adapters:
        made.put(one.name, wire.pack_adapter(one))
    return made


def resolve(
    made: Catalogue, text: str, *, tenant: str = "default", request_id: str = "r"
) -> AdapterRef:
    return made.resolve(adapter_name(text), tenant=tenant, request_id=request_id)


def refusal(made: Catalogue, text: str, *, tenant: str = "default") -> tuple[Reason, str]:
    with pytest.raises(RpcError) as caught:
        resolve(made, text, tenant=tenant)
    return caught.value.reason, caught.value.message


def test_a_bare_name_means_the_newest_version_with_all_that_its_reference_says() -> None:
    source = adapter()
    assert resolve(catalogue(source), "poet") == wire.read_adapter_ref(source.versions[-1].ref)


def test_a_version_and_an_alias_mean_what_they_say() -> None:
    made = catalogue(adapter(aliases={"prod": 2}))
    assert resolve(made, "poet@1").version == 1
    assert resolve(made, "poet@prod").version == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nobody", Reason.ADAPTER_NOT_FOUND),
        ("poet@9", Reason.ADAPTER_VERSION_NOT_FOUND),
        ("poet@best", Reason.ALIAS_NOT_FOUND),
    ],
)
def test_what_is_not_there_is_refused_with_its_own_reason(text: str, reason: Reason) -> None:
    assert refusal(catalogue(adapter()), text)[0] is reason


@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_a_canary_gets_its_share_of_the_requests(percent: int) -> None:
    canary = pb.Canary(version=3, percent=percent)
    made = catalogue(adapter(aliases={"prod": 1}, canaries={"prod": canary}))
    taken = [
        resolve(made, "poet@prod", request_id=f"req-{number}").version for number in range(REQUESTS)
    ]
    assert set(taken) == {1, 3}
    assert abs(taken.count(3) / REQUESTS - percent / 100) < 0.01


def test_a_request_that_comes_again_gets_the_same_version() -> None:
    canary = pb.Canary(version=3, percent=50)
    made = catalogue(adapter(aliases={"prod": 1}, canaries={"prod": canary}))
    again = catalogue(adapter(aliases={"prod": 1}, canaries={"prod": canary}))
    for number in range(1000):
        request_id = f"req-{number}"
        first = resolve(made, "poet@prod", request_id=request_id)
        assert resolve(again, "poet@prod", request_id=request_id) == first


def test_a_canary_that_grows_keeps_the_requests_that_it_had() -> None:
    def having(percent: int) -> set[str]:
        canary = pb.Canary(version=3, percent=percent)
        made = catalogue(adapter(aliases={"prod": 1}, canaries={"prod": canary}))
        ids = [f"req-{number}" for number in range(2000)]
        return {one for one in ids if resolve(made, "poet@prod", request_id=one).version == 3}

    assert having(5) < having(20) < having(60)


def test_canaries_of_two_aliases_take_different_requests() -> None:
    canary = pb.Canary(version=3, percent=50)
    made = catalogue(
        adapter(aliases={"prod": 1, "test": 1}, canaries={"prod": canary, "test": canary})
    )
    ids = [f"req-{number}" for number in range(2000)]
    both = sum(
        resolve(made, "poet@prod", request_id=one) == resolve(made, "poet@test", request_id=one)
        for one in ids
    )
    assert 800 < both < 1200


def test_a_canary_leaves_other_ways_to_name_the_adapter_alone() -> None:
    canary = pb.Canary(version=1, percent=99)
    made = catalogue(adapter(aliases={"prod": 2, "test": 2}, canaries={"prod": canary}))
    for number in range(200):
        for text in ("poet@2", "poet@test"):
            assert resolve(made, text, request_id=f"req-{number}").version == 2
        assert resolve(made, "poet", request_id=f"req-{number}").version == 3


@pytest.mark.parametrize("selector", ["", "@1", "@9", "@prod", "@nothing"])
def test_an_adapter_of_other_tenants_is_as_unknown_as_one_that_is_not_there(selector: str) -> None:
    hidden = adapter(aliases={"prod": 1}, tenants=["acme", "globex"])
    expected = refusal(Catalogue(), f"poet{selector}", tenant="initech")
    assert refusal(catalogue(hidden), f"poet{selector}", tenant="initech") == expected


def test_an_adapter_is_known_to_each_of_its_tenants() -> None:
    made = catalogue(adapter(tenants=["acme", "globex"]))
    assert resolve(made, "poet", tenant="acme") == resolve(made, "poet", tenant="globex")


def test_a_change_is_seen_at_once_whether_or_not_the_adapter_was_used() -> None:
    made = catalogue(adapter())
    assert resolve(made, "poet").version == 3
    made.put("poet", wire.pack_adapter(adapter(versions=4)))
    assert resolve(made, "poet").version == 4
    made.remove("poet")
    assert refusal(made, "poet")[0] is Reason.ADAPTER_NOT_FOUND


def test_few_adapters_stay_unpacked_however_many_are_used() -> None:
    names = [f"a{number}" for number in range(UNPACKED_MAX + 50)]
    made = catalogue(*(adapter(name, versions=1) for name in names))
    for name in names:
        resolve(made, name)
    assert len(made._unpacked) == UNPACKED_MAX
    assert resolve(made, names[0]).name == names[0]


def test_an_adapter_takes_a_few_hundred_bytes_and_microseconds() -> None:
    count = 5_000
    tracemalloc.start()
    try:
        made = catalogue(*(adapter(f"adapter-{number}", versions=1) for number in range(count)))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes / count < 500
    began_s = time.perf_counter()
    for number in range(count):
        resolve(made, f"adapter-{number}")  # each for the first time
    assert (time.perf_counter() - began_s) / count < 500e-6  # ten times the usual limit
