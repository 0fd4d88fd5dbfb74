"""Does one thing to a file, killed before the k-th SQL statement: ``python -m tests.faults.crash PATH WHAT K``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from postroom.broker.base import Ack, Dead, Release, Retry, Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker
from postroom.message import Failure, Message, new_id

COUNT = 4
FAILURE = Failure(attempt=1, reason="error", message="planted")
TOPICS = [Topic(name="q", queue=True), Topic(name="t", retention=60.0)]
SUBSCRIPTIONS = [
    Subscription(name="q", pattern="q", ordered=True),
    Subscription(name="a", pattern="t"),
    Subscription(name="b", pattern="#"),
]


def messages(topic: str) -> list[Message]:
    now = time.time()
    return [
        Message(id=new_id(), topic=topic, name="n", body=b"{}", key=f"k{n % 2}", created_at=now, idempotency_key=str(n))
        for n in range(COUNT)
    ]


async def publish(broker: SQLiteBroker) -> None:
    await broker.publish([*messages("q"), *messages("t")])


async def claim(broker: SQLiteBroker) -> None:
    consumer = await broker.consume("a")
    consumer.started(await consumer.receive(2, 0))


async def settle(broker: SQLiteBroker) -> None:
    consumer = await broker.consume("a")
    deliveries = await consumer.receive(COUNT, 0)
    outcomes = [Ack(b"1"), Retry(delay=0, failure=FAILURE), Release(), Dead(FAILURE)]
    await consumer.settle(list(zip(deliveries, outcomes, strict=True)))
    await consumer.close()


async def redrive(broker: SQLiteBroker) -> None:
    letters = await broker.dead_letters("a")
    await broker.redrive("a", [letter.message.id for letter in letters])


async def close(broker: SQLiteBroker) -> None:
    consumer = await broker.consume("a")
    await consumer.receive(COUNT, 0)
    await broker.close()


async def declare(broker: SQLiteBroker) -> None:
    await broker.declare([], [Subscription(name="late", pattern="t", start="earliest")])


async def prepare(path: str, *, dead: bool) -> SQLiteBroker:
    broker = SQLiteBroker(f"sqlite:///{path}")
    await broker.connect()
    await broker.declare(TOPICS, SUBSCRIPTIONS)
    if dead:
        consumer = await broker.consume("a")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await consumer.receive(COUNT, 0)])
        await consumer.close()
    return broker


async def main(path: str, what: str, step: int) -> None:
    broker = await prepare(path, dead=False)
    if what != "publish":
        await broker.publish(messages("t"))
    if what == "redrive":
        await broker.close()
        broker = await prepare(path, dead=True)
    left = step

    def count_down(statement: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    broker.engine.connection.set_trace_callback(count_down)
    await SCENARIOS[what](broker)
    broker_is_open = what != "close"
    if broker_is_open:
        broker.engine.connection.set_trace_callback(None)
    print("done", flush=True)
    # Not closed: the process ends with what it holds, as after a kill.
    os._exit(0)


SCENARIOS = {
    "publish": publish,
    "claim": claim,
    "settle": settle,
    "redrive": redrive,
    "close": close,
    "declare": declare,
}

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
