"""One scenario of Chameleon as text: what happened (>), what was decided, who has what out.

Queue-0 has requests of 100 tokens and a quota of 400, queue-1 larger ones and 600; the worker has
1000. Each request takes 5.5 s.
"""

from dataclasses import replace
from textwrap import dedent

from services.core.types import Attempt, RequestId
from tests.unit.core.chameleon_world import (
    TWO_QUEUES,
    OneWorker,
    large,
    quotas,
    request,
    small,
    two_queues,
)


def occupy(world: OneWorker, name: str, tokens: int, *, until_s: float) -> None:
    """By a request that the policy does not know, as after a restart of the scheduler."""
    adopted = request(name, context=tokens - 10)
    world.running[Attempt(RequestId(name))] = (adopted, until_s)


def test_lending_paying_back_passing_and_squashing() -> None:
    world = two_queues(config=replace(TWO_QUEUES, squash_fraction=1.0))
    lines: list[str] = []

    def then(what: str) -> None:
        out = ", ".join(f"{name} {used}" for name, _, used in quotas(world))
        lines.extend((f"> {what}", *world.take()))
        after = ", ".join(f"{name} {used}" for name, _, used in quotas(world))
        if after != out:
            lines.append(f"  out: {after}")

    for number in range(1, 8):
        world.push(small(f"s{number}"))
    then("seven small ones come; queue-1 is empty and lends 300")
    world.push(large("l1"))
    then("l1 comes: queue-1 has 300 left")
    world.push(large("l2"))
    then("l2 comes: queue-1 has nothing left")
    world.finish("s5")
    world.finish("s6")
    then("s5 and s6 end and pay 200 back to queue-1: l2 needs 300")
    world.finish("s7")
    then("s7 pays the rest back")
    for number in range(1, 5):
        world.finish(f"s{number}")
    world.finish("l1")
    world.finish("l2")
    occupy(world, "x", 200, until_s=30.0)
    occupy(world, "y", 300, until_s=30.0)
    world.push(request("huge", context=590, at=1.0))
    then("all end; x and y have 500 until 30 s; huge needs 600 and has the quota for it")
    world.push(large("l3", at=2.0))
    then("l3 comes and will end before 30 s")
    world.push(large("l4", at=3.0))
    then("l4 comes: l3 left 200 free")
    world.finish("x")
    then("x ends early: 400 free, 700 without l3")
    world.finish("l3")
    world.push(request("l3", number=2, context=292, prior=2, at=2.0))
    then("l3 has stopped and comes back")
    world.finish("y")
    world.finish("huge")
    then("y and huge end")
    expected = """
        > seven small ones come; queue-1 is empty and lends 300
        take s1 from queue-0, waited for nothing
        take s2 from queue-0, waited for nothing
        take s3 from queue-0, waited for nothing
        take s4 from queue-0, waited for nothing
        take s5 from queue-0, waited for quota
        take s6 from queue-0, waited for quota
        take s7 from queue-0, waited for quota
          out: queue-0 700, queue-1 0
        > l1 comes: queue-1 has 300 left
        take l1 from queue-1, waited for nothing
          out: queue-0 700, queue-1 300
        > l2 comes: queue-1 has nothing left
        > s5 and s6 end and pay 200 back to queue-1: l2 needs 300
        > s7 pays the rest back
        take l2 from queue-1, waited for quota
          out: queue-0 400, queue-1 600
        > all end; x and y have 500 until 30 s; huge needs 600 and has the quota for it
        > l3 comes and will end before 30 s
        take l3 from queue-1, waited for nothing
          out: queue-0 0, queue-1 300
        > l4 comes: l3 left 200 free
        > x ends early: 400 free, 700 without l3
        squash l3.1
        > l3 has stopped and comes back
        take huge from queue-1, waited for memory
          out: queue-0 0, queue-1 600
        > y and huge end
        take l3 from queue-1, waited for memory
        take l4 from queue-1, waited for nothing
          out: queue-0 0, queue-1 600
    """
    assert "\n".join(lines) == dedent(expected).strip()
