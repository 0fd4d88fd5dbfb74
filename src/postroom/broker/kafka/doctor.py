"""What can be wrong with a Kafka cluster and the topics of a namespace. Only looks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]

from postroom.broker.kafka.faults import error_of
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.wire import MAX_COPY, MAX_RECORD
from postroom.doctor import Finding

LEAST_METADATA = 4096
"""``offset.metadata.max.bytes``: what the ledger of a partition needs at most."""
LEAST_MEMORY = 30 * 24 * 60
"""Minutes for which the offsets of a subscription nobody consumes should be remembered."""

Settings = Mapping[str, str]


class Copies(NamedTuple):
    """A topic's replicas: the fewest of a partition, and the fewest in sync."""

    replicas: int
    in_sync: int


async def examine(admin: AdminClient, options: Options) -> list[Finding]:
    """Everything, if it may be looked at."""
    try:
        metadata = await asyncio.to_thread(admin.list_topics, timeout=options.timeout)
        brokers = [ConfigResource(ResourceType.BROKER, str(number)) for number in metadata.brokers]
        prefixes = tuple(f"{options.names.namespace}{mark}" for mark in ".-")
        mine = {name: topic for name, topic in metadata.topics.items() if name.startswith(prefixes)}
        settings = await _settings(admin, [*brokers, *(ConfigResource(ResourceType.TOPIC, name) for name in mine)])
    except KafkaException as error:
        detail = f"may not be looked at: {error_of(error).str()}"
        remedy = "allow DescribeConfigs on cluster and topics to this user, or run the doctor as another"
        return [Finding(level="warning", title="settings", detail=detail, remedy=remedy)]
    copies = {
        name: Copies(
            min((len(partition.replicas) for partition in topic.partitions.values()), default=0),
            min((len(partition.isrs) for partition in topic.partitions.values()), default=0),
        )
        for name, topic in mine.items()
    }
    found = list(cluster(settings[f"broker {min(metadata.brokers)}"], options))
    topics = {name: settings[f"topic {name}"] for name in mine}
    return [*found, *replication(copies, topics, len(metadata.brokers)), *contents(topics, options)]


def cluster(settings: Settings, options: Options) -> Iterator[Finding]:
    """``settings``: of a broker; https://kafka.apache.org/documentation/#brokerconfigs."""
    yield _judged(
        "topics made by accident",
        settings.get("auto.create.topics.enable") != "true",
        "auto.create.topics.enable = true: a client that mistypes a name makes a topic that nobody reads",
        "set auto.create.topics.enable=false on the brokers",
    )
    least, most = (float(settings.get(f"group.{end}.session.timeout.ms", "nan")) / 1000 for end in ("min", "max"))
    fits = not (options.session < least or options.session > most)
    detail = f"session={options.session:g} s is outside of what the brokers allow ({least:g} to {most:g} s)"
    remedy = "change ?session= of the URL, or group.min.session.timeout.ms and group.max.session.timeout.ms"
    yield _judged("session timeout", fits, detail, remedy, "error")
    memory = int(settings.get("offsets.retention.minutes", LEAST_MEMORY))
    yield _judged(
        "memory of idle subscriptions",
        memory >= LEAST_MEMORY,
        f"offsets.retention.minutes = {memory}: a subscription nobody consumes for {memory / 1440:.1f} days "
        "forgets what it has done and gets its messages again",
        f"set offsets.retention.minutes={LEAST_MEMORY} or more on the brokers",
    )
    room = int(settings.get("offset.metadata.max.bytes", LEAST_METADATA))
    yield _judged(
        "room beside an offset",
        room >= LEAST_METADATA,
        f"offset.metadata.max.bytes = {room}: what is done out of order may not fit, and settling fails",
        f"set offset.metadata.max.bytes={LEAST_METADATA} or more on the brokers",
        "error",
    )


def replication(copies: Mapping[str, Copies], topics: Mapping[str, Settings], brokers: int) -> Iterator[Finding]:
    """What of the messages survives the loss of a machine."""
    single = [name for name, found in copies.items() if found.replicas < 2]
    yield _judged(
        "copies of each message",
        not single,
        f"replication factor 1, lost with one machine: {_names(single)}",
        "reassign the partitions to three brokers, and declare with ?replication=3"
        if brokers > 1
        else "run three brokers, reassign the partitions to them, and declare with ?replication=3",
    )
    alone = [
        name
        for name, found in copies.items()
        if found.replicas > 1 and int(topics[name].get("min.insync.replicas", "1")) < 2
    ]
    yield _judged(
        "copies before a confirmation",
        not alone,
        f"min.insync.replicas = 1: confirmed though only one machine may have it: {_names(alone)}",
        "kafka-configs --alter --entity-type topics --entity-name NAME --add-config min.insync.replicas=2",
    )
    behind = [name for name, found in copies.items() if found.in_sync < found.replicas]
    detail = f"copies are behind or away: {_names(behind)}"
    yield _judged("copies in sync", not behind, detail, "look for brokers that are down, or disks that are slow")
    unclean = [name for name, found in topics.items() if found.get("unclean.leader.election.enable") == "true"]
    yield _judged(
        "leaders that lack messages",
        not unclean,
        f"unclean.leader.election.enable = true: after an outage confirmed messages may be gone: {_names(unclean)}",
        "kafka-configs --alter --entity-type topics --entity-name NAME "
        "--add-config unclean.leader.election.enable=false",
        "error",
    )


def contents(topics: Mapping[str, Settings], options: Options) -> Iterator[Finding]:
    """Whether Kafka keeps what it must, and takes what it should."""
    names = options.names
    kept = {name for name in topics if name == names.topology or name.startswith(names.dead(""))}
    policies = {name: found.get("cleanup.policy", "delete") for name, found in topics.items()}
    compacted = [name for name, policy in policies.items() if name not in kept and "compact" in policy]
    yield _judged(
        "compaction of messages",
        not compacted,
        f"cleanup.policy = compact: of messages with one key all but the last are deleted: {_names(compacted)}",
        "kafka-configs --alter --entity-type topics --entity-name NAME --add-config cleanup.policy=delete",
        "error",
    )
    deleted = [name for name in sorted(kept) if "delete" in policies[name]]
    yield _judged(
        "dead letters and topology",
        not deleted,
        f"cleanup.policy = delete: they vanish with time: {_names(deleted)}",
        "kafka-configs --alter --entity-type topics --entity-name NAME --add-config cleanup.policy=compact",
        "error",
    )
    ending = {
        name: int(found.get("retention.ms", "-1")) / 86_400_000
        for name, found in topics.items()
        if name not in kept and int(found.get("retention.ms", "-1")) >= 0
    }
    yield _judged(
        "messages that end by themselves",
        not ending,
        "retention.ms is set: what waits longer, for a worker or its time, is deleted unsettled: "
        + ", ".join(f"{name} after {days:.3g} days" for name, days in sorted(ending.items())),
        "kafka-configs --alter --entity-type topics --entity-name NAME --add-config retention.ms=-1, "
        "or make sure that every subscription keeps up and no delay is longer",
    )
    sizes = {name: MAX_RECORD if names.topic_of(name) else MAX_COPY for name in topics}
    small = [name for name, found in topics.items() if int(found.get("max.message.bytes", sizes[name])) < sizes[name]]
    yield _judged(
        "size of messages",
        not small,
        "max.message.bytes is too low: large messages are refused, or cannot be kept with their history: "
        + _names(small),
        f"kafka-configs --alter --entity-type topics --entity-name NAME --add-config max.message.bytes={MAX_COPY}",
    )


async def _settings(admin: AdminClient, resources: list[ConfigResource]) -> dict[str, Settings]:
    futures = admin.describe_configs(resources)
    found: dict[str, Settings] = {}
    for resource, future in futures.items():
        entries = await asyncio.wrap_future(future)
        kind = "broker" if resource.restype == ResourceType.BROKER else "topic"
        found[f"{kind} {resource.name}"] = {
            name: entry.value for name, entry in entries.items() if entry.value is not None
        }
    return found


def _judged(title: str, good: bool, detail: str, remedy: str, level: str = "warning") -> Finding:
    if good:
        return Finding(level="ok", title=title, detail="as it should be")
    return Finding(level="error" if level == "error" else "warning", title=title, detail=detail, remedy=remedy)


def _names(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
