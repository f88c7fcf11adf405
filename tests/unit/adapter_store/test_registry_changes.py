"""What each change makes of an entry, without storage."""

import json
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import pytest

from services.adapter_store import aliases, changes
from services.adapter_store.aliases import roll_back, set_alias, set_canary
from services.adapter_store.changes import DESCRIPTION_BYTES_MAX, PINS_MAX, Terms
from services.adapter_store.documents import FORMAT, EntryError, from_json, to_json
from services.adapter_store.entries import Canary, Entry, Pin, Provenance
from services.adapter_store.references import parse_reference
from services.common.errors import Reason, RpcError
from tests.unit.adapter_store.registry_parts import weights

Change = Callable[[Entry], Entry]


def _with_versions(count: int, **terms: Any) -> Entry:
    entry = Entry("a")
    for number in range(1, count + 1):
        entry = changes.publish(entry, weights(number), Terms(**terms), now_ns=number)
    return entry


def _after(entry: Entry, *steps: Change) -> Entry:
    return reduce(lambda before, step: step(before), steps, entry)


def _alias(alias: str, number: int) -> Change:
    return partial(set_alias, alias=alias, number=number)


def _canary(alias: str, number: int, percent: int = 10) -> Change:
    return partial(set_canary, alias=alias, canary=Canary(number, percent))


def _pin(reference: str, reason: str = "busy") -> Change:
    return partial(changes.pin, reference=parse_reference(reference), reason=reason, now_ns=7)


def _refusal(change: Change, entry: Entry) -> RpcError:
    with pytest.raises(RpcError) as caught:
        change(entry)
    return caught.value


# Aliases


def test_a_canary_keeps_the_main_version() -> None:
    entry = _after(_with_versions(2), _alias("stable", 1), _canary("stable", 2, 5))
    assert entry.aliases == {"stable": 1}
    assert entry.canaries == {"stable": Canary(2, 5)}
    assert entry.previous_versions == {}


def test_moving_an_alias_ends_its_canary_and_remembers_where_it_was() -> None:
    entry = _after(
        _with_versions(2), _alias("stable", 1), _canary("stable", 2), _alias("stable", 2)
    )
    assert entry.aliases == {"stable": 2}
    assert entry.canaries == {}
    assert entry.previous_versions == {"stable": 1}


def test_pointing_an_alias_where_it_points_ends_its_canary_and_forgets_nothing() -> None:
    steps = (_alias("x", 1), _alias("x", 2), _canary("x", 3), _alias("x", 2))
    entry = _after(_with_versions(3), *steps)
    assert entry.canaries == {}
    assert entry.previous_versions == {"x": 1}


def test_a_rollback_ends_the_canary_first_and_then_swaps() -> None:
    steps = (_alias("x", 1), _alias("x", 2), _canary("x", 3))
    entry = roll_back(_after(_with_versions(3), *steps), "x")
    assert (entry.aliases, entry.canaries) == ({"x": 2}, {})
    entry = roll_back(entry, "x")
    assert (entry.aliases, entry.previous_versions) == ({"x": 1}, {"x": 2})
    entry = roll_back(entry, "x")
    assert (entry.aliases, entry.previous_versions) == ({"x": 2}, {"x": 1})


def test_there_must_be_something_to_roll_back_to() -> None:
    entry = _after(_with_versions(3), _alias("x", 1))
    assert _refusal(partial(roll_back, alias="x"), entry).reason is Reason.ALIAS_HAS_NO_PREVIOUS
    moved = _after(entry, _alias("x", 2), partial(changes.delete_version, number=1))
    assert _refusal(partial(roll_back, alias="x"), moved).reason is Reason.ALIAS_HAS_NO_PREVIOUS


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        (_canary("x", 9), Reason.ADAPTER_VERSION_NOT_FOUND, "adapter"),
        (_canary("y", 2), Reason.ALIAS_NOT_FOUND, "adapter"),
        (_canary("x", 1), Reason.INVALID_FIELD, "version"),
        (_alias("x", 9), Reason.ADAPTER_VERSION_NOT_FOUND, "adapter"),
        (partial(roll_back, alias="y"), Reason.ALIAS_NOT_FOUND, "adapter"),
    ],
)
def test_an_alias_is_not_pointed_at_nothing(change: Change, reason: Reason, field: str) -> None:
    error = _refusal(change, _after(_with_versions(2), _alias("x", 1)))
    assert (error.reason, error.context.field) == (reason, field)


def test_an_alias_that_is_deleted_takes_its_canary_and_past_along() -> None:
    steps = (
        _alias("x", 1),
        _alias("x", 2),
        _canary("x", 3),
        partial(aliases.delete_alias, alias="x"),
    )
    entry = _after(_with_versions(3), *steps)
    assert (entry.aliases, entry.canaries, entry.previous_versions) == ({}, {}, {})


# Publishing


def test_a_wanted_number_is_given_when_it_is_the_next_one() -> None:
    entry = changes.publish(_with_versions(1), weights(2), Terms(number=2), now_ns=0)
    assert [version.number for version in entry.versions] == [1, 2]


def test_a_wanted_number_that_has_these_weights_changes_nothing() -> None:
    entry = _with_versions(2)
    assert changes.publish(entry, weights(1), Terms(number=1), now_ns=9) == entry


@pytest.mark.parametrize(
    ("number", "seed", "reason", "says"),
    [
        (1, 9, Reason.ADAPTER_VERSION_EXISTS, weights(1).digest),
        (2, 1, Reason.ADAPTER_VERSION_EXISTS, weights(2).digest),
        (4, 1, Reason.ADAPTER_VERSION_EXISTS, "a@1 already"),
        (3, 9, Reason.ADAPTER_VERSION_EXISTS, "was deleted"),
        (5, 9, Reason.INVALID_FIELD, "next version of a is 4"),
    ],
)
def test_a_wanted_number_that_cannot_be_given_is_refused(
    number: int, seed: int, reason: Reason, says: str
) -> None:
    entry = changes.delete_version(_with_versions(3), 3)
    error = _refusal(
        partial(changes.publish, weights=weights(seed), terms=Terms(number=number), now_ns=0), entry
    )
    assert (error.reason, error.context.field) == (reason, "metadata.version")
    assert says in error.message


def test_a_version_keeps_the_labels_and_origin_that_it_was_published_with() -> None:
    terms = Terms(labels={"team": "x"}, provenance=Provenance(source="run 1", publisher="acme"))
    entry = changes.publish(Entry("a"), weights(1), terms, now_ns=0)
    again = changes.publish(entry, weights(1), Terms(labels={"team": "y"}), now_ns=0)
    assert again == entry
    assert again.versions[0].labels == {"team": "x"}
    assert again.versions[0].provenance.source == "run 1"


def test_labels_of_all_versions_together_have_a_limit() -> None:
    labels = {f"k{n}": "v" * 256 for n in range(32)}
    per_version_bytes = sum(len(key) + len(value) for key, value in labels.items())
    entry = _with_versions(DESCRIPTION_BYTES_MAX // per_version_bytes, labels=labels)
    error = _refusal(
        partial(changes.publish, weights=weights(9999), terms=Terms(labels=labels), now_ns=0), entry
    )
    assert (error.reason, error.context.field) == (
        Reason.FIELD_LIMIT_EXCEEDED,
        "metadata.labels",
    )


# Visibility


def test_tenants_are_given_with_the_first_version_only() -> None:
    entry = _with_versions(1, tenants=("acme",))
    assert entry.tenants == ("acme",)
    assert _after(entry, partial(changes.publish, weights=weights(2), now_ns=0)).tenants == (
        "acme",
    )
    error = _refusal(
        partial(changes.publish, weights=weights(2), terms=Terms(tenants=("b",)), now_ns=0), entry
    )
    assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "metadata.tenants")


def test_who_may_not_see_an_adapter_may_not_publish_under_its_name() -> None:
    entry = _with_versions(1, tenants=("acme",))

    def publish_by(tenant: str) -> Change:
        terms = Terms(provenance=Provenance(publisher=tenant))
        return partial(changes.publish, weights=weights(1), terms=terms, now_ns=0)

    error = _refusal(publish_by("other"), entry)
    assert error.reason is Reason.PERMISSION_DENIED
    assert weights(1).digest not in error.message
    assert "version" not in error.message
    assert publish_by("acme")(entry) == entry
    assert publish_by("")(entry) == entry
    assert publish_by("other")(changes.delete_all(entry)).is_live


def test_visibility_is_changed_and_opened_again() -> None:
    entry = changes.set_visibility(_with_versions(1), ("a", "b"))
    assert [entry.is_visible_to(tenant) for tenant in ("a", "c", "")] == [True, False, True]
    assert changes.set_visibility(entry, ()).is_visible_to("c")


# Pins


def test_a_pin_follows_what_it_names() -> None:
    steps = (_alias("x", 1), _pin("a"), _pin("a@x"), _pin("a@1"))
    entry = _after(_with_versions(2), *steps)
    assert [pin.selector for pin in entry.pins] == ["", "x", "1"]
    later = _after(entry, _alias("x", 2), partial(changes.publish, weights=weights(3), now_ns=0))
    found = [later.pinned(pin) for pin in later.pins]
    assert [version.number for version in found if version] == [3, 2, 1]


def test_pinning_again_changes_the_reason_only() -> None:
    entry = _after(_with_versions(1), _pin("a", "first"), _pin("a", "second"))
    assert entry.pins == (Pin("", "second", 7),)


def test_pins_of_an_adapter_have_a_limit() -> None:
    steps = [_pin(f"a@{number}") for number in range(1, PINS_MAX + 1)]
    entry = _after(_with_versions(PINS_MAX + 1), *steps)
    error = _refusal(_pin("a"), entry)
    assert error.reason is Reason.FIELD_LIMIT_EXCEEDED
    assert _after(entry, _pin("a@1", "again")).pins[0].reason == "again"


@pytest.mark.parametrize("reference", ["a", "a@1", "a@x"])
def test_what_is_not_pinned_cannot_be_unpinned(reference: str) -> None:
    unpin = partial(changes.unpin, reference=parse_reference(reference))
    entry = _after(_with_versions(2), _alias("x", 1))
    assert _refusal(unpin, entry).reason is Reason.PIN_NOT_FOUND
    assert _after(entry, _pin(reference), unpin) == entry


# Deleting


@pytest.mark.parametrize(
    ("need", "resource"),
    [
        ((_alias("x", 2),), ("alias", "a@x")),
        ((_alias("x", 1), _canary("x", 2)), ("alias", "a@x")),
        ((_pin("a@2"),), ("pin", "a@2")),
    ],
)
def test_a_version_that_is_needed_is_not_deleted(
    need: tuple[Change, ...], resource: tuple[str, str]
) -> None:
    entry = _after(_with_versions(3), *need)
    error = _refusal(partial(changes.delete_version, number=2), entry)
    assert error.reason is Reason.ADAPTER_IN_USE
    assert (error.context.resource_type, error.context.resource_name) == resource


def test_a_pin_of_the_newest_version_moves_on_unless_it_is_the_last_one() -> None:
    entry = _after(_with_versions(2), _pin("a"), partial(changes.delete_version, number=2))
    error = _refusal(partial(changes.delete_version, number=1), entry)
    assert (error.reason, error.context.resource_name) == (Reason.ADAPTER_IN_USE, "a")


def test_an_alias_that_a_pin_follows_is_not_deleted() -> None:
    entry = _after(_with_versions(1), _alias("x", 1), _pin("a@x"))
    error = _refusal(partial(aliases.delete_alias, alias="x"), entry)
    assert (error.reason, error.context.resource_type) == (Reason.ADAPTER_IN_USE, "pin")


def test_the_past_of_an_alias_does_not_keep_a_version() -> None:
    steps = (_alias("x", 1), _alias("x", 2), partial(changes.delete_version, number=1))
    assert _after(_with_versions(2), *steps).previous_versions == {}


def test_deleting_everything_leaves_the_next_number_only() -> None:
    steps = (_alias("x", 1), _canary("x", 2), _pin("a"), changes.delete_all)
    entry = _after(_with_versions(2, tenants=("acme",)), *steps)
    assert entry == Entry("a", next_version=3)


# Documents


def test_everything_survives_its_document() -> None:
    terms = Terms(
        labels={"team": "x"},
        tenants=("acme",),
        provenance=Provenance("s", "acme", "0.19.1", "1" * 64, "2" * 64),
    )
    entry = changes.publish(Entry("a", changed_ns=5, change_id="c"), weights(1), terms, now_ns=3)
    steps = (partial(changes.publish, weights=weights(2), now_ns=4), _alias("x", 2))
    entry = _after(entry, *steps, _alias("x", 1), _canary("x", 2), _pin("a@x"))
    assert from_json(to_json(entry), name="a", revision=0) == entry


def test_a_document_of_the_first_format_is_read() -> None:
    document = {
        "format": 1,
        "name": "a",
        "revision": 4,
        "versions": [
            {
                "number": 2,
                "created_ns": 7,
                "weights": {
                    "digest": "sha256:" + "0" * 64,
                    "rank": 8,
                    "size_bytes": 1000,
                    "target_modules": ["q_proj"],
                    "dtype": "BF16",
                    "base_model": "acme/base",
                    "parameters": 512,
                },
            }
        ],
        "aliases": {"stable": 2},
        "next_version": 3,
        "change_id": "ab",
    }
    entry = from_json(json.dumps(document).encode(), name="a", revision=4)
    assert entry.aliases == {"stable": 2}
    assert (entry.changed_ns, entry.canaries, entry.tenants, entry.pins) == (0, {}, (), ())
    assert entry.versions[0].labels == {}
    assert entry.versions[0].provenance == Provenance()
    assert _after(entry, _alias("blue", 2)).next_version == 3


@pytest.mark.parametrize(
    "spoilt",
    [
        {"format": FORMAT + 1},
        {"format": 0},
        {"name": "b"},
        {"revision": 9},
        {"invented": 1},
        {"versions": [{}]},
        {"versions": None},
        {"aliases": 3},
        {"aliases": {"x": "newest"}},
        {"tenants": [3]},
        {"versions": [{"number": 1, "created_ns": 0, "labels": {"x": 1}}]},
        {"canaries": {"x": 1}},
        {"pins": [{"selector": "x"}]},
        {"next_version": "many"},
    ],
)
def test_a_document_that_this_release_cannot_read_is_refused(spoilt: dict[str, Any]) -> None:
    document = json.loads(to_json(_with_versions(1)))
    with pytest.raises(EntryError):
        from_json(json.dumps({**document, **spoilt}).encode(), name="a", revision=0)
