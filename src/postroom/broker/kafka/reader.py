"""Reading what is there: a stretch of a topic from one offset to another, outside of any group."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from postroom.broker.kafka.faults import error_of, translated
from postroom.broker.kafka.options import Options
from postroom.errors import BrokerClosed, BrokerUnavailable

T = TypeVar("T")

Place = tuple[str, int]
"""Topic and partition."""


_NEW = 5.0
"""Seconds within which every server knows of a new topic."""
_NOT_YET = {
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
}


class Reader:
    """One client in one thread; calls wait for each other."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="postroom-kafka-reader")
        self._consumer: Consumer | None = None
        self._why: KafkaError | None = None
        """Why there is no connection; the errors of calls say only that there is none."""
        self._closed = False

    async def call(self, function: Callable[[Reader], T]) -> T:
        """``function(reader)`` in the reader's thread. Raises ``BrokerUnavailable``."""
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, function)
        except KafkaException as error:
            raise translated("cannot read from Kafka", self._why or error_of(error)) from error

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._consumer is not None:
                await asyncio.get_running_loop().run_in_executor(self._executor, self._consumer.close)
            self._executor.shutdown(wait=False)

    # In the reader's thread

    def _run(self, function: Callable[[Reader], T]) -> T:
        self._why = None
        try:
            return function(self)
        except KafkaException:
            if self._consumer is not None:
                # The client tells why only when it is polled.
                self._consumer.poll(0)
            raise

    def bounds(self, topic: str, partition: int = 0) -> tuple[int, int]:
        """The first offset, and the one after the last."""
        deadline = time.monotonic() + _NEW
        while True:
            try:
                found: tuple[int, int] = self._client().get_watermark_offsets(
                    TopicPartition(topic, partition), timeout=self._options.timeout
                )
                return found
            except KafkaException as error:
                if error_of(error).code() not in _NOT_YET or time.monotonic() > deadline:
                    raise
                self._client().list_topics(topic, timeout=self._options.timeout)
                time.sleep(0.02)

    def topics(self) -> dict[str, int]:
        """All topics of the server and how many partitions each has."""
        found = self._client().list_topics(timeout=self._options.timeout).topics
        return {name: len(topic.partitions) for name, topic in found.items() if topic.partitions}

    def offsets_at(self, topic: str, partitions: int, since: float) -> list[int]:
        """For each partition the first offset that was written at or after the unix time ``since``."""
        asked = [TopicPartition(topic, partition, max(0, int(since * 1000))) for partition in range(partitions)]
        found = self._client().offsets_for_times(asked, timeout=self._options.timeout)
        for place in found:
            if place.error is not None:  # Its offset is still what was asked: a time.
                raise KafkaException(place.error)
        return [
            place.offset if place.offset >= 0 else self.bounds(topic, place.partition)[1]
            for place in sorted(found, key=lambda place: place.partition)
        ]

    def records(self, spans: Mapping[Place, tuple[int, int]]) -> Iterator[Any]:
        """Every record in ``[start, end)`` of each place. Stops at the end of a log: compaction leaves gaps."""
        wanted = {place: span for place, span in spans.items() if span[0] < span[1]}
        if not wanted:
            return
        consumer = self._client()
        consumer.assign([TopicPartition(*place, span[0]) for place, span in wanted.items()])
        try:
            yield from self._read(consumer, wanted)
        finally:
            consumer.unassign()

    def _read(self, consumer: Consumer, wanted: dict[Place, tuple[int, int]]) -> Iterator[Any]:
        heard = time.monotonic()
        while wanted:
            first = consumer.poll(0.1)
            if first is None:
                if time.monotonic() - heard > self._options.timeout:
                    raise BrokerUnavailable(f"Kafka does not answer: nothing to be read from {sorted(wanted)}")
                continue
            heard = time.monotonic()
            batch: list[Any] = [first, *consumer.consume(1000, 0)]
            for record in batch:
                place, error = (record.topic(), record.partition()), record.error()
                if error is not None:
                    if error.code() != KafkaError._PARTITION_EOF:
                        raise KafkaException(error)
                    wanted.pop(place, None)
                elif place in wanted:
                    end = wanted[place][1]
                    if record.offset() < end:
                        yield record
                    if record.offset() >= end - 1:
                        del wanted[place]

    def _failed(self, error: KafkaError) -> None:
        # Of many the one that says what to do: who refuses us matters more than that all are out of reach.
        refused = error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL)
        if refused or (self._why is None and error.code() == KafkaError._TRANSPORT):
            self._why = error

    def _client(self) -> Consumer:
        if self._consumer is None:
            self._consumer = Consumer(
                self._options.client
                | {
                    "group.id": f"{self._options.names.namespace}-reader",
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "earliest",
                    "enable.partition.eof": True,
                    "fetch.wait.max.ms": 20,
                    "socket.timeout.ms": int(self._options.timeout * 1000),
                    "reconnect.backoff.max.ms": 1000,
                    "error_cb": self._failed,
                    "log_level": 2,
                }
            )
        return self._consumer
