"""One subscription a worker takes messages from, and what it holds of it."""

from __future__ import annotations

from postroom.broker.base import Consumer, Delivery
from postroom.worker.work import Work


class Source:
    """A consumer with the deliveries it has not settled. Lives on the broker's loop."""

    def __init__(self, name: str, consumer: Consumer, lease: float) -> None:
        self.name = name
        self.consumer = consumer
        self.lease = lease
        self.held: dict[Delivery, Work] = {}
        self.renewed_at = 0.0
        """Monotonic seconds of the last time the broker confirmed the leases."""
