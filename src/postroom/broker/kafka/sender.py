"""Sending records: an idempotent producer with ``acks=all``, and the one thread that hears of its confirmations."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from postroom.broker.kafka import bridge
from postroom.broker.kafka.faults import error_of, translated
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.wire import MAX_COPY, Record

logger = logging.getLogger("postroom.broker")

_BURST = 5_000


class _Batch:
    """Counts the confirmations of one ``send``."""

    def __init__(self, size: int) -> None:
        self.errors: list[KafkaError | None] = [None] * size
        self._left = size
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()

    def confirm(self, number: int, error: KafkaError | None, record: Any) -> None:
        """On the producer's thread."""
        if error is not None:
            self.errors[number] = error
        self._left -= 1
        if not self._left:
            bridge.tell(self._loop, self._finish)

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Sender:
    """Made on the event loop; connects when warmed or used. A producer that failed for good is replaced."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._producer: Producer | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def warm(self) -> None:
        """Ask the server for a producer id now: the first message would wait half a second for it."""
        self._started()

    async def send(self, records: Sequence[Record]) -> list[KafkaError | None]:
        """Returns, in order, ``None`` for each that every replica in sync has, else why it is not known to be."""
        if not records:
            return []
        producer = self._started()
        batch = _Batch(len(records))
        for number, record in enumerate(records):
            confirm = partial(batch.confirm, number)
            refused = self._produce(producer, record, confirm)
            if refused is not None and refused.code() == KafkaError._QUEUE_FULL:
                refused = await self._produce_with_room(producer, record, confirm)
            if refused is not None:
                confirm(refused, None)
            if number % _BURST == _BURST - 1:
                await asyncio.sleep(0)
        await batch.done
        if any(error is not None and error.fatal() for error in batch.errors):
            self._retire(producer)
        return batch.errors

    async def deliver(self, what: str, records: Sequence[Record]) -> None:
        """All of them, or an error: ``BrokerUnavailable`` if it is not known of each that it is there."""
        for error in await self.send(records):
            if error is not None:
                raise translated(what, error)

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._producer is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._producer.flush, self._options.timeout)
            self._retire(self._producer)

    def _produce(self, producer: Producer, record: Record, confirm: Any) -> KafkaError | None:
        """Why it is not under way."""
        try:
            producer.produce(
                record.topic, record.value, record.key, record.partition, on_delivery=confirm, headers=record.headers
            )
        except BufferError:
            return KafkaError(KafkaError._QUEUE_FULL)
        except KafkaException as error:
            return error_of(error)
        return None

    async def _produce_with_room(self, producer: Producer, record: Record, confirm: Any) -> KafkaError | None:
        deadline = asyncio.get_running_loop().time() + self._options.timeout
        while True:
            await asyncio.sleep(0.005)
            refused = self._produce(producer, record, confirm)
            if refused is None or refused.code() != KafkaError._QUEUE_FULL:
                return refused
            if asyncio.get_running_loop().time() > deadline:
                return refused

    def _started(self) -> Producer:
        if self._producer is None:
            self._producer = Producer(
                self._options.client
                | {
                    "enable.idempotence": True,
                    "acks": "all",
                    "linger.ms": 0,
                    "partitioner": "murmur2_random",
                    "message.max.bytes": MAX_COPY,
                    "delivery.timeout.ms": int(self._options.timeout * 1000),
                    "request.timeout.ms": int(self._options.timeout * 500),
                    "reconnect.backoff.max.ms": 1000,
                    "queue.buffering.max.messages": 500_000,
                    # Without it a poll would raise, and whoever waits for a confirmation wait for ever.
                    "error_cb": self._failed,
                    "log_level": 2,
                }
            )
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=_listen, args=(self._producer, self._stop), name="postroom-kafka-producer", daemon=True
            )
            self._thread.start()
        return self._producer

    def _failed(self, error: KafkaError) -> None:
        """On the producer's thread. What is sent tells of its errors itself."""
        if error.fatal():
            logger.warning("Kafka: a producer has failed for good and is replaced: %s", error.str())
            if self._producer is not None:
                self._retire(self._producer)

    def _retire(self, producer: Producer) -> None:
        if self._producer is producer:
            self._stop.set()
            self._producer = None


def _listen(producer: Producer, stop: threading.Event) -> None:
    # Whoever still waits for a confirmation of a producer that was replaced is told, too.
    while not stop.is_set() or len(producer):
        producer.poll(0.2)
