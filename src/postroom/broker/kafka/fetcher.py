"""Messages as they come: one thread that waits for them, outside of any group."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from postroom.broker.kafka import bridge
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place

logger = logging.getLogger("postroom.broker")

_TURN = 0.05
"""Seconds after which a wait for messages is interrupted to see whether others are wanted."""


class _Wish(NamedTuple):
    """What is to be read. Never changed, so that the thread cannot miss half of it."""

    epoch: int
    places: list[TopicPartition]
    pauses: deque[tuple[Place, bool]]


class Fetcher:
    """Told which partitions to read from where. Constructed on the event loop."""

    def __init__(
        self, options: Options, arrived: Callable[[int, list[Any]], None], failed: Callable[[KafkaError], None]
    ) -> None:
        """``arrived(epoch, records)`` is called on the event loop, ``failed`` on any thread."""
        self._loop = asyncio.get_running_loop()
        self._arrived = arrived
        self._failed = failed
        self._wish = _Wish(0, [], deque())
        self._stop = threading.Event()
        self._consumer = Consumer(
            options.client
            | {
                "group.id": f"{options.names.namespace}-fetcher",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                # A partition that is new here waits for the answer to what was asked before it.
                "fetch.wait.max.ms": 100,
                "fetch.queue.backoff.ms": 10,
                "queued.min.messages": 2000,
                "queued.max.messages.kbytes": 16_384,
                "socket.timeout.ms": int(options.timeout * 1000),
                "reconnect.backoff.max.ms": 1000,
                "error_cb": failed,
                "log_level": 2,
            }
        )
        self._thread = threading.Thread(target=self._run, name="postroom-kafka-fetcher", daemon=True)
        self._thread.start()

    def read(self, starts: Mapping[Place, int | None]) -> int:
        """Read these partitions and no others, each from its offset (``None``: from the beginning,
        which is 0 or, if that is gone, where the client is sent by ``auto.offset.reset``).

        Returns the epoch: what comes with another was fetched for an earlier wish.
        """
        places = [TopicPartition(*place, at or 0) for place, at in starts.items()]
        self._wish = _Wish(self._wish.epoch + 1, places, deque())
        return self._wish.epoch

    def pause(self, place: Place, paused: bool) -> None:
        """Read no more of a partition, for a while."""
        self._wish.pauses.append((place, paused))

    async def close(self) -> None:
        self._stop.set()
        await self._loop.run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        epoch = 0
        learnt: set[str] = set()
        stopped: set[Place] = set()
        while not self._stop.is_set() and not self._loop.is_closed():
            try:
                wish = self._wish
                if wish.epoch != epoch:
                    for topic in {place.topic for place in wish.places} - learnt:
                        # Who leads it: the client by itself would ask once a second.
                        self._consumer.list_topics(topic, timeout=5.0)
                        learnt.add(topic)
                    # What is paused stays so in the client, even if it is assigned anew.
                    self._consumer.resume([TopicPartition(*place) for place in stopped])
                    stopped.clear()
                    self._consumer.assign(wish.places)
                    epoch = wish.epoch  # Only now: after an error it is tried again.
                while wish.pauses:
                    place, paused = wish.pauses.popleft()
                    (self._consumer.pause if paused else self._consumer.resume)([TopicPartition(*place)])
                    (stopped.add if paused else stopped.discard)(place)
                first = self._consumer.poll(_TURN)
                if first is not None:
                    self._hand_over(epoch, [first, *self._consumer.consume(499, 0)])
            except KafkaException as error:
                self._failed(error.args[0])
                self._stop.wait(0.1)
            except Exception:
                # Without this thread nothing more would come, and nobody would be told.
                logger.exception("Kafka: a defect; the fetching goes on")
                self._stop.wait(0.1)
        self._consumer.close()

    def _hand_over(self, epoch: int, messages: list[Any]) -> None:
        records = []
        for message in messages:
            error = message.error()
            if error is None:
                records.append(message)
            else:
                self._failed(error)
        if not records:
            return
        taken = threading.Event()

        def take() -> None:
            taken.set()
            self._arrived(epoch, records)

        bridge.tell(self._loop, take)
        # One batch at a time, so that a slow loop is not buried.
        while not taken.wait(_TURN) and not self._stop.is_set() and not self._loop.is_closed():
            pass
