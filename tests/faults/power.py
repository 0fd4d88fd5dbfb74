"""The process whose machine loses power: publishes and settles, and says what was confirmed.

``python -m tests.faults.power URL [PRAGMA]``: ``PRAGMA`` plants a weaker setting.
"""

from __future__ import annotations

import asyncio
import sys

from postroom.broker.base import Ack, Dead, Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker
from postroom.message import Failure, Message, new_id

QUEUE = "work"
FAILURE = Failure(attempt=1, reason="error", message="it broke")


def say(what: str, message_id: str) -> None:
    print(what, message_id, flush=True)


async def main(url: str, weaker: str | None) -> None:
    broker = SQLiteBroker(url)
    await broker.connect()
    # The moments when the log is copied into the file, and begun anew, are the delicate ones: let there be many.
    broker.engine.connection.execute("PRAGMA wal_autocheckpoint = 100")
    if weaker is not None:
        broker.engine.connection.execute(f"PRAGMA {weaker}")
    await broker.declare([Topic(name=QUEUE, queue=True)], [Subscription(name=QUEUE, pattern=QUEUE)])
    # Short: what a machine held when it lost power is free once the lease is over.
    consumer = await broker.consume(QUEUE, lease=1.0)
    number = 0
    while True:
        number += 1
        sent = Message(id=new_id(), topic=QUEUE, name="work", body=b"x" * (number % 3000), created_at=1.0)
        say("sending", sent.id)
        await broker.publish([sent])
        say("published", sent.id)
        if number % 2 == 0:
            (delivery,) = await consumer.receive(1, 1.0)
            outcome = Dead(FAILURE) if number % 8 == 0 else Ack()
            say("settling", delivery.message.id)
            assert await consumer.settle([(delivery, outcome)]) == [None]
            say("dead" if number % 8 == 0 else "done", delivery.message.id)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
