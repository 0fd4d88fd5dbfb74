"""What the doctor makes of settings: each planted misconfiguration is found, and what is right is not complained of."""

from __future__ import annotations

import pytest

from postroom.broker.kafka import doctor
from postroom.broker.kafka.doctor import Copies
from postroom.broker.kafka.options import parse
from postroom.doctor import Finding

OPTIONS = parse("kafka://localhost")
CLUSTER = {
    "auto.create.topics.enable": "false",
    "group.min.session.timeout.ms": "6000",
    "group.max.session.timeout.ms": "1800000",
    "offsets.retention.minutes": "43200",
    "offset.metadata.max.bytes": "4096",
}
TOPIC = {
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "max.message.bytes": "2097152",
}
OWN = TOPIC | {"max.message.bytes": "3145728"}
LETTERS = OWN | {"cleanup.policy": "compact"}
NAMES = {"postroom.orders": TOPIC, "postroom-dead.orders": LETTERS, "postroom-topology": LETTERS}


def problems(findings: list[Finding]) -> list[tuple[str, str]]:
    assert all(finding.remedy for finding in findings if finding.level != "ok"), "a problem without a remedy"
    return [(finding.level, finding.title) for finding in findings if finding.level != "ok"]


def test_what_is_right_is_ok() -> None:
    copies = dict.fromkeys(NAMES, Copies(3, 3))
    findings = [
        *doctor.cluster(CLUSTER, OPTIONS), *doctor.replication(copies, NAMES, 3), *doctor.contents(NAMES, OPTIONS)
    ]  # fmt: skip
    assert problems(findings) == []


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("auto.create.topics.enable", "true", ("warning", "topics made by accident")),
        ("group.min.session.timeout.ms", "10000", ("error", "session timeout")),
        ("offsets.retention.minutes", "10080", ("warning", "memory of idle subscriptions")),
        ("offset.metadata.max.bytes", "1024", ("error", "room beside an offset")),
    ],
)
def test_the_cluster(setting: str, value: str, found: tuple[str, str]) -> None:
    assert problems(list(doctor.cluster(CLUSTER | {setting: value}, OPTIONS))) == [found]


@pytest.mark.parametrize(
    ("copies", "settings", "found"),
    [
        (Copies(1, 1), TOPIC, ("warning", "copies of each message")),
        (Copies(3, 3), TOPIC | {"min.insync.replicas": "1"}, ("warning", "copies before a confirmation")),
        (Copies(3, 2), TOPIC, ("warning", "copies in sync")),
        (
            Copies(3, 3),
            TOPIC | {"unclean.leader.election.enable": "true"},
            ("error", "leaders that lack messages"),
        ),
    ],
)
def test_the_copies(copies: Copies, settings: dict[str, str], found: tuple[str, str]) -> None:
    name = "postroom.orders"
    assert problems(list(doctor.replication({name: copies}, {name: settings}, 3))) == [found]


@pytest.mark.parametrize(
    ("name", "setting", "value", "found"),
    [
        ("postroom.orders", "cleanup.policy", "compact,delete", ("error", "compaction of messages")),
        ("postroom-later.orders", "cleanup.policy", "compact", ("error", "compaction of messages")),
        ("postroom-dead.orders", "cleanup.policy", "delete", ("error", "dead letters and topology")),
        ("postroom.orders", "retention.ms", "604800000", ("warning", "messages that end by themselves")),
        ("postroom.orders", "max.message.bytes", "1048588", ("warning", "size of messages")),
        ("postroom-dead.orders", "max.message.bytes", "2097152", ("warning", "size of messages")),
    ],
)
def test_the_topics(name: str, setting: str, value: str, found: tuple[str, str]) -> None:
    right = NAMES.get(name, OWN)
    assert problems(list(doctor.contents({name: right | {setting: value}}, OPTIONS))) == [found]
