"""Brokers on a Kafka server that many tests share: each test has a namespace of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from services.base import Server

from postroom.broker.base import Subscription, Topic
from postroom.broker.kafka import KafkaBroker


def namespace() -> str:
    """A new one, as an option of a URL."""
    return f"namespace=t{uuid4().hex[:12]}"


def url_of(server: Server) -> str:
    """Of a new namespace, whose topics have one partition."""
    return f"{server.url}?{namespace()}&partitions=1"


@asynccontextmanager
async def opened(url: str, *queues: str) -> AsyncIterator[KafkaBroker]:
    """Connected, and with these queues declared; for a minute."""
    broker = KafkaBroker(url)
    await broker.connect()
    try:
        if queues:
            await broker.declare(
                [Topic(name=name, queue=True) for name in queues],
                [Subscription(name=name, pattern=name) for name in queues],
            )
        async with asyncio.timeout(60):
            yield broker
    finally:
        await broker.close()
