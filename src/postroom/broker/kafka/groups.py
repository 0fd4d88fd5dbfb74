"""What is asked of a consumer group from outside of it: how far it is, and to be forgotten.

Not everything that the client offers for it can be used: with ``list_consumer_group_offsets`` librdkafka ends the
process if a server says that it is not the group's coordinator (https://github.com/confluentinc/librdkafka/issues/5040),
and with every such question if it runs out of time within the client while the coordinator is away, as soon as that is
back (https://github.com/confluentinc/librdkafka/issues/4605).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from postroom.broker.kafka.faults import error_of, translated
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place
from postroom.errors import BrokerClosed, BrokerUnavailable

T = TypeVar("T")

Committed = tuple[int | None, str | None]
"""An offset, if there is one, and the text beside it."""

_AT_ONCE = 4
"""Questions that do not wait for others."""
_NEVER = 3600.0
"""Seconds for a request: the most that the client allows."""
_FINE = {KafkaError.NON_EMPTY_GROUP, KafkaError.GROUP_ID_NOT_FOUND}
"""Members of other processes leave when they see; until then what the group has is without effect."""


class Groups:
    """Each question has a client of its own: only one of the group itself can ask, and none is kept half-answered."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="postroom-kafka-groups")
        self._closed = False

    async def committed(self, group: str, places: Sequence[Place]) -> dict[Place, Committed]:
        """Of each of these partitions. Raises ``BrokerUnavailable``."""
        return await self._call("cannot ask for the offsets of the group", lambda: self._committed(group, places))

    async def delete(self, group: str) -> None:
        """Unless it still has members. Raises ``BrokerUnavailable``."""
        await self._call("cannot delete the consumer group", lambda: self._delete(group))

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False)

    async def _call(self, what: str, question: Callable[[], T]) -> T:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, question)
        except KafkaException as error:
            raise translated(what, error_of(error)) from error
        except TimeoutError as error:
            raise BrokerUnavailable(f"{what}: its coordinator does not answer; it may succeed later") from error

    # In a thread

    def _committed(self, group: str, places: Sequence[Place]) -> dict[Place, Committed]:
        consumer = Consumer(
            self._client() | {"group.id": group, "enable.auto.commit": False, "error_cb": lambda error: None}
        )
        try:
            asked = [TopicPartition(*place) for place in places]
            found = consumer.committed(asked, timeout=self._options.timeout) if asked else []
        finally:
            consumer.close()
        for place in found:
            if place.error is not None:
                raise KafkaException(place.error)
        return {
            (place.topic, place.partition): (place.offset if place.offset >= 0 else None, place.metadata)
            for place in found
        }

    def _delete(self, group: str) -> None:
        admin = AdminClient(self._client())
        (future,) = admin.delete_consumer_groups([group], request_timeout=_NEVER).values()
        try:
            future.result(self._options.timeout)
        except KafkaException as error:
            if error_of(error).code() not in _FINE:
                raise
        finally:
            del admin  # With what it was not answered; an error would keep it.

    def _client(self) -> dict[str, Any]:
        return self._options.client | {
            "socket.timeout.ms": int(self._options.timeout * 1000),
            "reconnect.backoff.max.ms": 1000,
            "log_level": 2,
        }
