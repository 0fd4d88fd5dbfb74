"""Room: Kafka is told to delete what every subscription is done with and no retention covers.

Kafka's own ``retention.ms`` looks at age alone, and would delete what still waits; so it is off unless asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from postroom.broker.kafka.faults import error_of, translated
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place
from postroom.broker.kafka.survey import Survey
from postroom.broker.kafka.topology import Entry, Topology

_FINE = {KafkaError.OFFSET_OUT_OF_RANGE, KafkaError.UNKNOWN_TOPIC_OR_PART}
"""Somebody else was quicker."""


async def trim(
    options: Options, topology: Topology, admin: Callable[[], AdminClient], survey: Callable[[Entry], Survey]
) -> dict[Place, int]:
    """Returns where each partition begins now, of those that have lost something. Raises ``BrokerUnavailable``."""
    keep: dict[Place, int] = {}
    for topic in list(topology.topics.values()):
        name = options.names.topic(topic.name)
        ends = (await topology.ends([name])).get(name)
        if ends is None:
            continue  # Somebody has deleted it.
        kept = await topology.retained(topic) if topic.retention and not topic.queue else ends
        keep |= {(name, number): min(pair) for number, pair in enumerate(zip(kept, ends, strict=True))}
    # Only now: who has declared a subscription before is known then, and who does it later begins behind these ends.
    await topology.refresh()
    for entry in list(topology.subscriptions.values()):
        for place, stretch in (await survey(entry).stretches()).items():
            done = stretch.ledger.prefix or 0
            keep[place] = min(keep.get(place, done), done)
    places = [TopicPartition(*place, offset) for place, offset in keep.items() if offset > 0]
    if not places:
        return {}
    futures = admin().delete_records(places, request_timeout=options.timeout)
    for future in futures.values():
        try:
            await asyncio.wrap_future(future)
        except KafkaException as error:
            if error_of(error).code() not in _FINE:
                raise translated("cannot delete what is done", error_of(error)) from error
    return {(place.topic, place.partition): place.offset for place in places}
