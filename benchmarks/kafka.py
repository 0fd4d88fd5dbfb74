"""Kafka: a whole worker and a producer beside hand-written loops on the same client, same server, same durability.

``python -m benchmarks.kafka [messages]`` starts a server of its own. Both loops confirm what they send with
``acks=all`` and commit what they have handled before they take more.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from services.kafka import KafkaServer

from benchmarks.beside import BODY, measured, show_latency, show_loop, show_workers

BATCH = 500
HEADERS: Any = [("ce_id", b"0192d1c2-7a6b-7c3d-8e4f-001122334455"), ("ce_type", b"noop")]
PARTITIONS = 8


def raw_send(servers: str, count: int) -> dict[str, float]:
    """In a child: an idempotent producer that waits for each batch."""
    producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "acks": "all"})
    confirmed: list[Any] = []
    producer.list_topics("raw", timeout=10)

    def main() -> None:
        for start in range(0, count, BATCH):
            for number in range(start, start + BATCH):
                producer.produce(
                    "raw",
                    BODY,
                    partition=number % PARTITIONS,
                    headers=HEADERS,
                    on_delivery=lambda *told: confirmed.append(told),
                )
            producer.flush()
        assert len(confirmed) == count

    return measured(main, count)


def raw_take(servers: str, count: int) -> dict[str, float]:
    """In a child: a group of one; a coroutine for each message, then a commit for all of them."""
    consumer = Consumer(
        {"bootstrap.servers": servers, "group.id": "raw", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    )
    consumer.subscribe(["raw"])

    async def handle(body: bytes, headers: Any) -> None:
        assert body
        assert headers

    async def take() -> None:
        done = 0
        while done < count:
            first = consumer.poll(1.0)
            if first is None:
                continue
            records: list[Any] = [first, *consumer.consume(BATCH - 1, 0)]
            ends: dict[int, int] = {}
            for record in records:
                await handle(record.value(), record.headers())
                ends[record.partition()] = record.offset() + 1
            places = [TopicPartition("raw", number, end) for number, end in ends.items()]
            consumer.commit(offsets=places, asynchronous=False)
            done += len(records)

    while not consumer.assignment():
        consumer.poll(0)
        time.sleep(0.05)
    found = measured(lambda: asyncio.run(take()), count)
    consumer.close()
    return found


def main(count: int) -> None:
    server = KafkaServer(Path(tempfile.mkdtemp(prefix="postroom-kafka-")))
    server.start()
    servers = server.url.removeprefix("kafka://")
    try:
        admin = AdminClient({"bootstrap.servers": servers})
        for future in admin.create_topics([NewTopic("raw", PARTITIONS, 1)]).values():
            future.result()
        show_loop("produce and flush, by 500", raw_send, count, servers=servers)
        show_loop("consume and commit, by 500", raw_take, count, servers=servers)
        show_workers(server.url, count)
        show_latency(server.url)
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.kafka

    benchmarks.kafka.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
