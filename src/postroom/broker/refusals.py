"""How every consumer says no, in the same words."""

from __future__ import annotations

from postroom.errors import AlreadySettled, BrokerClosed, ConfigurationError, LeaseLost


def check_count(max_messages: int) -> None:
    """What ``receive`` was asked for. Raises ``ConfigurationError``."""
    if max_messages < 1:
        raise ConfigurationError(f"receive: max_messages must be at least 1, not {max_messages}")


def consumer_closed(subscription: str) -> BrokerClosed:
    return BrokerClosed(f"the consumer of {subscription} was closed; open a new one")


def of_another_consumer(message_id: str) -> LeaseLost:
    return LeaseLost(f"message {message_id} was delivered to another consumer")


def lease_over(message_id: str) -> LeaseLost:
    return LeaseLost(f"the lease of message {message_id} is over; it belongs to somebody else now")


def settled_before(message_id: str) -> AlreadySettled:
    return AlreadySettled(f"message {message_id} was settled before; the first settlement stands")
