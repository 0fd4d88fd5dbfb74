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

from benchmarks import latency, producing, worker
from benchmarks.child import Child, await_go, cpu_seconds, run, run_together
from benchmarks.pulse import rate

BATCH = 500
BODY = b'{"n":1}'
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

    return _measured(main, count)


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
    found = _measured(lambda: asyncio.run(take()), count)
    consumer.close()
    return found


def _measured(main: Any, count: int) -> dict[str, float]:
    await_go()
    wall, cpu = time.perf_counter(), cpu_seconds()
    main()
    wall = time.perf_counter() - wall
    return {"cpu": (cpu_seconds() - cpu) / count * 1e6, "rate": count / wall}


def _told(what: str, cpu: float, each: float) -> None:
    print(f"{what:42} {each:10,.0f} messages/s {cpu:8.1f} µs CPU a message", flush=True)


def _wait(what: str, times: list[float]) -> None:
    ordered = sorted(times)
    middle, late = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    print(f"{what:42} p50 {middle:.2f} ms, p99 {late:.2f} ms", flush=True)


def main(count: int) -> None:
    server = KafkaServer(Path(tempfile.mkdtemp(prefix="postroom-kafka-")))
    server.start()
    servers = server.url.removeprefix("kafka://")
    try:
        admin = AdminClient({"bootstrap.servers": servers})
        for future in admin.create_topics([NewTopic("raw", PARTITIONS, 1)]).values():
            future.result()
        for what, function in (
            ("raw: produce and flush, by 500", raw_send),
            ("raw: consume and commit, by 500", raw_take),
        ):
            (found,) = run_together([Child(function, servers=servers, count=count)])
            _told(what, found["cpu"], found["rate"])
        for processes in (1, 2):
            sent = run(producing.enqueue, broker=server.url, task="noop", count=count)
            if processes == 1:
                print("postroom: enqueue_many", sent)
            children = [Child(worker.drain, broker=server.url, queue="quick") for _ in range(processes)]
            results = run_together(children)
            assert sum(result["count"] for result in results) == count
            cpu = sum(result["cpu"] for result in results) / count * 1e6
            _told(f"postroom: worker, {processes} process(es)", cpu, rate(results))
        waiting = Child(latency.work, broker=server.url)
        try:
            waiting.read()
            time.sleep(2.0)
            begin, before = time.monotonic(), float(waiting.ask("cpu"))
            time.sleep(5.0)
            share = (float(waiting.ask("cpu")) - before) / (time.monotonic() - begin) * 100
            times = run(latency.produce, broker=server.url, count=200, pause=0.02)
            waiting.tell("stop")
            starts = waiting.result()
        finally:
            waiting.kill()
        _wait(
            "postroom: confirmed to started",
            [max(0.0, starts[str(n)] - end) * 1000 for n, (_, end) in enumerate(times)],
        )
        _wait(
            "postroom: enqueue called to started",
            [(starts[str(n)] - begin) * 1000 for n, (begin, _) in enumerate(times)],
        )
        print(f"{'postroom: idle worker':42} {share:.2f} % of a core")
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.kafka

    benchmarks.kafka.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
