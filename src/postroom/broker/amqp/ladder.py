"""How a message waits: on its way down a ladder of queues, each of which holds it for a fixed time.

A time to live for each message would make the short wait behind the long: only the head of a queue expires. So there
is one queue for every power of two of ``UNIT``, and a delay is a sum of them. The routing key spells the sum: its
first ``LEVELS`` words are the bits, ``1`` for "wait here", ``0`` for "pass by", the rest is the destination. One
ladder serves all subscriptions. From level to level the server moves messages at least once.
"""

from __future__ import annotations

from postroom.broker.amqp.address import Address
from postroom.broker.amqp.link import Channel

LEVELS = 22
UNIT = 0.05
"""Seconds; waits are rounded up to it."""
LONGEST = UNIT * (2**LEVELS - 1)
"""Seconds, some 58 hours. What must wait longer is sent down again by whoever consumes it."""

_ANY = "*." * LEVELS
_LOST_KEPT = 1000


def to_queue(subscription: str) -> str:
    return f"q.{subscription}"


def to_topic(topic: str) -> str:
    return f"e.{topic}"


def leads_to(destination: str) -> str:
    """The binding key, on the exchange at the end of the ladder, for a destination or a pattern of them."""
    return _ANY + destination


def way(address: Address, delay: float, destination: str) -> tuple[str, str]:
    """Exchange and routing key for a message that is to arrive after ``delay`` seconds (``LONGEST`` at most)."""
    units = min(2**LEVELS - 1, max(1, -int(-delay // UNIT)))
    bits = ".".join(f"{units:0{LEVELS}b}")
    return step(address, units.bit_length() - 1), f"{bits}.{destination}"


def topic_of(routing_key: str) -> str:
    """The topic or subscription in a routing key that has come down the ladder."""
    return routing_key[len(_ANY) + 2 :]


def end(address: Address) -> str:
    """The exchange at the end, to which all destinations are bound."""
    return address.internal("delay:end")


def step(address: Address, level: int) -> str:
    """The queue, and the exchange before it, that are as long as ``UNIT`` times two to the power of ``level``."""
    return address.internal(f"delay:{level}")


async def declare(channel: Channel, address: Address) -> None:
    # What arrives for a subscription that is gone must go somewhere: a queue that cannot pass on its messages
    # tries again without end, and holds up those behind (rabbitmq.com/docs/quorum-queues, "at-least-once").
    lost = address.internal("delay:lost")
    await channel.call("exchange_declare", exchange=lost, exchange_type="fanout", durable=True)
    kept = {"x-queue-type": "quorum", "x-max-length": _LOST_KEPT}
    await channel.call("queue_declare", queue=lost, durable=True, arguments=kept)
    await channel.call("queue_bind", queue=lost, exchange=lost, routing_key="")
    await channel.call(
        "exchange_declare",
        exchange=end(address), exchange_type="topic", durable=True, arguments={"alternate-exchange": lost},
    )  # fmt: skip
    for level in range(LEVELS):
        await _declare_step(channel, address, level)


async def _declare_step(channel: Channel, address: Address, level: int) -> None:
    here, below = step(address, level), step(address, level - 1) if level else end(address)
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": int(UNIT * 1000) << level,
        "x-dead-letter-exchange": below,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    above = "*." * (LEVELS - 1 - level)
    await channel.call("exchange_declare", exchange=here, exchange_type="topic", durable=True)
    await channel.call("queue_declare", queue=here, durable=True, arguments=arguments)
    await channel.call("queue_bind", queue=here, exchange=here, routing_key=f"{above}1.#")
    await channel.call("exchange_bind", destination=below, source=here, routing_key=f"{above}0.#")
