"""The outbox while the broker is away: nothing is lost, and when it is back everything goes out in order."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from services.base import Server

from postroom import App, create_outbox
from postroom.broker.base import Broker, Capabilities
from postroom.store.outbox.relay import Relay
from tests.conftest import wait_until
from tests.servers import private

OUTAGE = float(os.environ.get("POSTROOM_TEST_OUTAGE", "5"))
"""Seconds. Pauses between tries grow to 5 s and no further, so a longer one goes no other way."""
KEYS = 5


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "how"), [("redis", "killed"), ("redis", "frozen"), ("rabbitmq", "killed")])
def test_an_outage_ends_in_order(name: str, how: str, tmp_path: Path) -> None:
    placed: list[tuple[str, int]] = []
    done: list[tuple[str, int]] = []
    with (
        private(name, tmp_path / "server") as server,
        App(server.url) as app,
        closing(sqlite3.connect(tmp_path / "shop.db")) as shop,
    ):

        @app.task(queue="work", ordered=True)
        def book(key: str, number: int) -> None:
            done.append((key, number))

        def place() -> None:
            """Three messages of one key in one transaction."""
            key = str(len(placed) // 3 % KEYS)
            new = [(key, number) for number in range(len(placed), len(placed) + 3)]
            using = book.using(transaction=shop, key=key)
            using.enqueue_many(using.call(*one) for one in new)
            shop.commit()
            placed.extend(new)

        create_outbox(shop)
        shop.commit()
        with relaying(f"sqlite:///{tmp_path}/shop.db", app) as relay:
            for _ in range(2 * KEYS):
                place()
            wait_until(lambda: relay.stats().waiting == 0, "all were sent", 30)
            with away(server, how):
                begin = time.monotonic()
                while time.monotonic() < begin + OUTAGE:
                    place()
                    time.sleep(0.02)
                assert relay.stats().waiting > 0
            wait_until(lambda: relay.stats().waiting == 0, "the outbox is empty", 90)
            assert relay.stats().set_aside == 0
        app.run_worker(drain=True)
        known_ids = app.thread.call(capabilities).known_ids
    for key in map(str, range(KEYS)):
        first = list(dict.fromkeys(number for of, number in done if of == key))
        assert first == [number for of, number in placed if of == key]
    if known_ids:
        assert Counter(done) == Counter(placed)


async def capabilities(broker: Broker) -> Capabilities:
    return broker.capabilities


@contextmanager
def away(server: Server, how: str) -> Iterator[None]:
    if how == "killed":
        server.kill()
        yield
        server.start()
    else:
        server.pause()
        yield
        server.resume()


@contextmanager
def relaying(url: str, app: App) -> Iterator[Relay]:
    relay, stop = Relay(url, app.outlet.send), threading.Event()
    thread = threading.Thread(target=relay.run, args=(stop,))
    thread.start()
    try:
        yield relay
    finally:
        stop.set()
        thread.join(30)
        relay.close()
