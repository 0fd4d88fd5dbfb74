"""The outbox: from a PostgreSQL database to a broker that confirms, by one relay.

``python -m benchmarks.outbox [messages]`` starts servers of its own. Exit code 1 below 5,000 messages/s
without keys; messages of one key wait for each other to be confirmed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import psycopg
from services.base import Server
from services.postgresql import PostgreSQLServer
from services.rabbitmq import RabbitMQServer
from services.redis import RedisServer

from postroom import App, create_outbox
from postroom.store.outbox.relay import Relay

TARGET = 5_000


def measure(database: str, broker: str, count: int, *, of_key: int) -> float:
    """Messages a second; ``of_key`` messages after each other have one key, 0: they have none."""
    with App(broker) as app, psycopg.connect(database) as connection:

        @app.task(queue="orders")
        def book(number: int) -> None: ...

        app.connect()
        create_outbox(connection)
        for number in range(0, count, of_key or count):
            using = book.using(transaction=connection, key=str(number) if of_key else None)
            using.enqueue_many(using.call(number) for _ in range(of_key or count))
        connection.commit()
        relay = Relay(database, app.outlet.send)
        relay.run_once()
        sent, begin, spent = 0, time.perf_counter(), time.process_time()
        while done := relay.run_once():
            sent += done
        seconds, spent = time.perf_counter() - begin, time.process_time() - spent
        relay.close()
        app.unsubscribe("orders")
    what = f"{of_key} of each key" if of_key else "no keys"
    speed = f"{sent / seconds:,.0f} messages/s, {spent / sent * 1e6:.0f} µs CPU a message"
    print(f"{broker.partition(':')[0]}, {what}: {speed}")
    return sent / seconds


def main(count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="postroom-benchmark-") as folder:
        place = Path(folder)
        redis = RedisServer(place / "redis", options=("--appendfsync", "everysec"))
        servers: list[Server] = [PostgreSQLServer(place / "postgresql"), redis, RabbitMQServer(place / "rabbitmq")]
        try:
            for server in servers:
                server.start()
            rates = [
                [measure(servers[0].url, server.url, count, of_key=of_key) for of_key in (0, 4)]
                for server in servers[1:]
            ]
        finally:
            for server in servers:
                server.stop()
    return int(min(without for without, _ in rates) < TARGET)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
