"""What a broker cannot do is refused, and named."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import msgspec
import pytest

from postroom.broker.base import Capabilities, Subscription, Topic
from postroom.broker.demands import check_topology, serves_all, unmet
from postroom.broker.memory import MemoryBroker
from postroom.errors import UnsupportedOperation
from postroom.message import Message, new_id
from postroom.producer.publisher import _publish

ALL = MemoryBroker.capabilities
NOW = 1_000_000.0


def message(**options: Any) -> Message:
    return Message(id=new_id(), topic="t", name="work", body=b"{}", **options)


@pytest.mark.parametrize(
    ("capability", "value", "asking"),
    [
        ("deduplication", False, {"idempotency_key": "k"}),
        ("priorities", frozenset({2}), {"priority": 1}),
        ("expiry", False, {"expires_at": NOW + 1}),
        ("delay", 900.0, {"not_before": NOW + 901}),
    ],
)
def test_a_message_asks_for_too_much(capability: str, value: Any, asking: dict[str, Any]) -> None:
    poor = msgspec.structs.replace(ALL, **{capability: value})
    assert not serves_all(poor)
    refusal = unmet(poor, message(**asking), NOW)
    assert refusal is not None
    assert refusal.capability == capability
    assert unmet(poor, message(), NOW) is None
    assert unmet(ALL, message(**asking), NOW) is None


@pytest.mark.parametrize(
    ("capability", "asking"),
    [
        ("ordering", {"ordered": True}),
        ("patterns", {"pattern": "a.#"}),
        ("filters", {"where": {"a": "b"}}),
        ("retention", {"start": "earliest"}),
        ("limits", {"limit": 5}),
    ],
)
def test_a_subscription_asks_for_too_much(capability: str, asking: dict[str, Any]) -> None:
    poor = msgspec.structs.replace(ALL, **{capability: False})
    wanted = [Subscription(**({"name": "s", "pattern": "t"} | asking))]
    with pytest.raises(UnsupportedOperation, match="'s'") as refused:
        check_topology(poor, [], wanted)
    assert refused.value.capability == capability
    check_topology(ALL, [], wanted)


def test_a_topic_asks_for_too_much() -> None:
    with pytest.raises(UnsupportedOperation, match="'t'"):
        check_topology(msgspec.structs.replace(ALL, retention=False), [Topic(name="t", retention=5.0)], [])


def test_the_others_of_a_batch_are_published() -> None:
    class Plain(MemoryBroker):
        capabilities: ClassVar[Capabilities] = msgspec.structs.replace(ALL, priorities=frozenset())

    async def act() -> None:
        broker = Plain(f"memory://{new_id()}")
        await broker.connect()
        await broker.declare([Topic(name="t")], [])
        one, urgent, other = message(), message(priority=5), message()
        first, refusal, last = await _publish(broker, [one, urgent, other])
        assert (first, last) == (one.id, other.id)
        assert isinstance(refusal, UnsupportedOperation)
        await broker.close()

    asyncio.run(act())
