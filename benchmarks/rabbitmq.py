"""RabbitMQ: a whole worker and a producer beside hand-written loops on the same client, same server, same durability.

``python -m benchmarks.rabbitmq [messages]`` starts a server of its own. Quorum queues, publisher confirms, manual acks.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from services.rabbitmq import RabbitMQServer

from benchmarks.beside import BODY, measured, show_latency, show_loop, show_times, show_workers
from benchmarks.child import run

BATCH = 100


async def channel_of(url: str) -> Any:
    loop = asyncio.get_running_loop()
    opened = loop.create_future()
    AsyncioConnection(pika.URLParameters(url), on_open_callback=opened.set_result)
    connection = await opened
    ready = loop.create_future()
    connection.channel(on_open_callback=ready.set_result)
    channel = await ready
    await called(channel.queue_declare, queue="raw", durable=True, arguments={"x-queue-type": "quorum"})
    return channel


async def called(method: Callable[..., object], **arguments: Any) -> None:
    answer = asyncio.get_running_loop().create_future()
    method(**arguments, callback=answer.set_result)
    await answer


def raw_send(url: str, count: int) -> dict[str, float]:
    """In a child: publish a hundred, wait for their confirms, and so on."""

    async def main() -> None:
        channel = await channel_of(url)
        confirmed, wanted = 0, 0
        all_there = asyncio.Event()

        def on_confirm(frame: Any) -> None:
            nonlocal confirmed
            confirmed = max(confirmed, frame.method.delivery_tag)
            if confirmed >= wanted:
                all_there.set()

        await called(channel.confirm_delivery, ack_nack_callback=on_confirm)
        properties = pika.BasicProperties(content_type="application/json", delivery_mode=2)
        for _ in range(count // BATCH):
            all_there.clear()
            wanted += BATCH
            for _ in range(BATCH):
                channel.basic_publish("", "raw", BODY, properties, mandatory=True)
            await all_there.wait()

    return measured(lambda: asyncio.run(main()), count)


def raw_take(url: str, count: int) -> dict[str, float]:
    """In a child: a coroutine for each message, then one ack for a hundred of them."""

    async def handle(body: bytes) -> None:
        assert body

    async def main() -> None:
        channel = await channel_of(url)
        await called(channel.basic_qos, prefetch_count=5 * BATCH)
        arrived: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        channel.basic_consume("raw", lambda _, method, __, body: arrived.put_nowait((method.delivery_tag, body)))
        for number in range(1, count + 1):
            tag, body = await arrived.get()
            await handle(body)
            if number % BATCH == 0:
                channel.basic_ack(tag, multiple=True)
        await called(channel.basic_qos, prefetch_count=1)

    return measured(lambda: asyncio.run(main()), count)


def raw_wait(url: str) -> list[float]:
    """In a child: one message at a time to a waiting consumer, in milliseconds."""

    async def main() -> list[float]:
        times: list[float] = []
        reader, writer = await channel_of(url), await channel_of(url)
        arrived: asyncio.Queue[int] = asyncio.Queue()
        reader.basic_consume("raw", lambda _, method, *__: arrived.put_nowait(method.delivery_tag))
        properties = pika.BasicProperties(delivery_mode=2)
        for _ in range(200):
            await asyncio.sleep(0.02)
            begin = time.perf_counter()
            writer.basic_publish("", "raw", BODY, properties)
            tag = await arrived.get()
            times.append((time.perf_counter() - begin) * 1000)
            reader.basic_ack(tag)
        return times

    return asyncio.run(main())


def main(count: int) -> None:
    server = RabbitMQServer(Path(tempfile.mkdtemp(prefix="postroom-rabbitmq-")))
    server.start()
    try:
        show_loop("publish, confirms by 100", raw_send, count, url=server.url)
        show_loop("consume, acks by 100", raw_take, count, url=server.url)
        show_workers(server.url, count)
        show_times("raw: publish to arrival", run(raw_wait, url=server.url))
        show_latency(server.url)
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.rabbitmq

    benchmarks.rabbitmq.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
