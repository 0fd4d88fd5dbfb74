"""SQS: the adapter and a whole worker beside a hand-written loop on the same client.

``python -m benchmarks.sqs [messages]`` starts an emulator, whose speed bounds the wall time: the CPU of this process a
message is the number to read.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from services.sqs import CREDENTIALS, SQSServer

from postroom import App
from postroom.broker.base import Ack, Subscription, Topic
from postroom.broker.sqs import SQSBroker
from postroom.message import Message, new_id
from postroom.worker.process import Worker, WorkerOptions

BODY = b'{"text": "' + b"x" * 240 + b'"}'
LANES = 8


class Measured:
    """Wall and CPU time of this process between two moments."""

    def __init__(self, what: str, count: int) -> None:
        self._what, self._count = what, count
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def done(self) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        rate, each = self._count / wall, cpu / self._count * 1e6
        print(f"{self._what:32} {rate:10,.0f} messages/s {each:8,.0f} µs CPU a message", flush=True)


async def raw(server: SQSServer, count: int) -> None:
    """Batches of ten, so many requests at once: what anybody would write."""
    config = AioConfig(max_pool_connections=64, parameter_validation=False)
    session = AioSession()
    async with session.create_client(
        "sqs", region_name="eu-west-1", endpoint_url=server.endpoint_url, config=config
    ) as sqs:
        url = (await sqs.create_queue(QueueName=f"raw-{uuid4().hex}"))["QueueUrl"]
        left = iter(range(count // 10))

        async def send() -> None:
            for _ in left:
                entries = [{"Id": str(n), "MessageBody": BODY.decode()} for n in range(10)]
                await sqs.send_message_batch(QueueUrl=url, Entries=entries)

        measured = Measured("raw: send", count)
        await asyncio.gather(*(send() for _ in range(LANES)))
        measured.done()
        done = 0

        async def take() -> None:
            nonlocal done
            while done < count:
                answer = await sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
                messages = answer.get("Messages", [])
                if messages:
                    entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)]
                    await sqs.delete_message_batch(QueueUrl=url, Entries=entries)
                    done += len(messages)

        measured = Measured("raw: receive and delete", count)
        await asyncio.gather(*(take() for _ in range(LANES)))
        measured.done()


async def adapter(server: SQSServer, count: int) -> None:
    broker = SQSBroker(f"{server.url}&namespace=b{uuid4().hex[:12]}")
    await broker.connect()
    await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
    messages = [Message(id=new_id(), topic="q", name="noop", body=BODY) for _ in range(count)]
    measured = Measured("adapter: publish", count)
    for start in range(0, count, 500):
        await broker.publish(messages[start : start + 500])
    measured.done()
    consumer = await broker.consume("q")
    settling: set[asyncio.Task[Any]] = set()
    done = 0
    measured = Measured("adapter: receive and ack", count)
    while done < count:
        deliveries = await consumer.receive(100, 1.0)
        done += len(deliveries)
        settling.add(asyncio.create_task(consumer.settle([(delivery, Ack()) for delivery in deliveries])))
    await asyncio.gather(*settling)
    measured.done()
    await broker.close()


def worker(server: SQSServer, count: int) -> None:
    with App(f"{server.url}&namespace=b{uuid4().hex[:12]}") as app:
        left, finished = count, threading.Event()

        @app.task(queue="q")
        async def noop(text: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                finished.set()

        text = "x" * 240
        measured = Measured("app: enqueue_many", count)
        noop.enqueue_many(noop.call(text) for _ in range(count))
        measured.done()
        running = Worker(app, WorkerOptions(concurrency=100))
        thread = threading.Thread(target=lambda: asyncio.run(running.run()))
        measured = Measured("worker: no-op jobs", count)
        thread.start()
        finished.wait()
        running.stop()
        thread.join()
        measured.done()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    os.environ.update(CREDENTIALS)
    server = SQSServer(Path(tempfile.mkdtemp(prefix="postroom-sqs-")))
    server.start()
    runs: list[Callable[[SQSServer, int], Awaitable[None]]] = [raw, adapter]
    try:
        for run in runs:
            asyncio.run(run(server, count))  # type: ignore[arg-type]
        worker(server, count)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
