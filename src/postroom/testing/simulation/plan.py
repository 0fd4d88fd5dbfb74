"""What is to be published in a run: stories drawn from the seed, of which each asks for other promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from postroom.testing.simulation.observed import Order

PRODUCERS = 2
_MORE_STORIES = (1, 1, 2)
"""Few, for each costs steps: more worlds find more than bigger ones."""


def orders(random: Random) -> list[list[Order]]:
    """One list a producer."""
    drawn = dict.fromkeys(random.sample([*STORIES, *_OFTEN], random.choice(_MORE_STORIES)))
    found = [order for story in (_payments, *map(STORIES.__getitem__, drawn)) for order in story(random)]
    producers: list[list[Order]] = [[] for _ in range(PRODUCERS)]
    by_key: dict[str, list[Order]] = {}
    for order in found:
        producer = random.choice(producers)
        if order.key is not None:
            producer = by_key.setdefault(order.key, producer)
        producer.append(order)
    for producer in producers:
        _shuffle_but_keys(random, producer)
    return producers


def _payments(random: Random) -> Iterator[Order]:
    """Effects that must happen once; some are published with a key, to be tried again."""
    for number in range(random.randint(2, 5)):
        label = f"transfer-{number}"
        yield _paying(random, label, "transfer", idempotency_key=random.choice([None, label]))


def _later(random: Random) -> Iterator[Order]:
    """Delayed ones, and such as are cancelled before or while they run."""
    for number in range(random.randint(1, 3)):
        yield _paying(random, f"later-{number}", "transfer", delay=random.random() * 2.0)
    for number in range(random.randint(1, 3)):
        yield _paying(random, f"unwanted-{number}", "transfer", unwanted=True, delay=random.choice([0.0, 1.0]))


def _slow(random: Random) -> Iterator[Order]:
    """Longer than a lease."""
    for number in range(random.randint(1, 2)):
        yield _paying(random, f"slow-{number}", "slow")


def _ordered(random: Random) -> Iterator[Order]:
    """By key, while some fail."""
    for key in ("key-a", "key-b"):
        for number in range(random.randint(1, 4)):
            label = f"ordered-{key}-{number}"
            yield _paying(random, label, "ordered", fails=_fails(random), idempotency_key=label, key=key)


def _flaky(random: Random) -> Iterator[Order]:
    for number in range(random.randint(2, 4)):
        yield _order(f"flaky-{number}", "flaky", fails=_fails(random))


def _poison(random: Random) -> Iterator[Order]:
    """What fails until somebody mends it, and redrives it."""
    for number in range(random.randint(1, 3)):
        yield _order(f"poison-{number}", "poison")


def _events(random: Random) -> Iterator[Order]:
    """For two subscriptions, and some for a third that wants those of one region."""
    for number in range(random.randint(2, 4)):
        yield _order(f"paid-{number}", "paid", region=random.choice(["eu", "us"]))


def _joined(random: Random) -> Iterator[Order]:
    """In transactions of a database that commit or roll back: the broker's own, or one with an outbox."""
    for number in range(random.randint(1, 2)):
        yield _paying(random, f"joined-{number}", "transfer", joined=True, rolled_back=random.random() < 0.3)
    for number in range(random.randint(2, 5)):
        yield _paying(
            random, f"in-line-{number}", "ordered", fails=0, joined=True, rolled_back=random.random() < 0.2, key="line"
        )


def _shared(random: Random) -> Iterator[Order]:
    """What several producers publish under one key."""
    amount = random.randint(1, 9)
    for number in range(random.randint(2, 4)):
        arguments = {"label": "shared", "amount": amount}
        yield _order(f"shared-{number}", "transfer", idempotency_key="shared", **arguments)


def _unique(random: Random) -> Iterator[Order]:
    """The same call again and again: one at a time."""
    for number in range(random.randint(3, 6)):
        yield _order(f"single-{number}", "single", label="single", idempotency_key="single", unique="until_done")


def _debounced(random: Random) -> Iterator[Order]:
    """Of those that wait only the latest counts."""
    for number in range(random.randint(3, 6)):
        yield _order(
            f"latest-{number}",
            "latest",
            idempotency_key="latest",
            unique="until_started",
            replace=True,
            delay=random.choice([0.0, 0.5]),
        )


def _expiring(random: Random) -> Iterator[Order]:
    """Some are too late before somebody has time for them."""
    for number in range(random.randint(2, 4)):
        delay, expires_in = random.choice([(0.0, 0.05), (0.0, 0.5), (0.0, 2.0), (2.5, 0.5)])
        yield _order(f"brief-{number}", "brief", delay=delay, expires_in=expires_in)
    yield _paying(random, "hog", "slow")


def _snoozed(random: Random) -> Iterator[Order]:
    """Put off more often than they may fail."""
    for number in range(random.randint(1, 3)):
        yield _order(f"sleepy-{number}", "sleepy", naps=random.choice([0, 2, 7]))


def _killers(random: Random) -> Iterator[Order]:
    """What kills the process that runs it, among others, of which some run in processes of their own."""
    for number in range(random.randint(1, 2)):
        yield _order(f"killer-{number}", "killer")
    for number in range(random.randint(1, 3)):
        yield _paying(random, f"apart-{number}", "apart")


STORIES: dict[str, Callable[[Random], Iterator[Order]]] = {
    "later": _later,
    "slow": _slow,
    "ordered": _ordered,
    "flaky": _flaky,
    "poison": _poison,
    "events": _events,
    "joined": _joined,
    "shared": _shared,
    "unique": _unique,
    "debounced": _debounced,
    "expiring": _expiring,
    "snoozed": _snoozed,
    "killers": _killers,
}
_OFTEN = ("joined", "poison", "killers")
"""Drawn twice as often: they have processes of their own."""

_OPTIONS = (
    "key", "delay", "expires_in", "idempotency_key", "unique", "replace", "joined", "rolled_back", "unwanted"
)  # fmt: skip
_QUEUES = {
    "transfer": "payments",
    "slow": "payments",
    "brief": "payments",
    "killer": "payments",
    "apart": "payments",
    "ordered": "ordered",
    "poison": "broken",
}


def _paying(random: Random, label: str, task: str, **more: object) -> Order:
    return _order(label, task, amount=random.randint(1, 9), **more)


def _order(name: str, task: str, **more: object) -> Order:
    """``more``: options of the order, the rest are arguments. ``label``: what the handler is told, if not ``name``."""
    options = {option: more.pop(option) for option in _OPTIONS if option in more}
    if task == "paid":
        # In the order in which an event's subscriptions are shown, all that want it.
        subscriptions = ("audit", "mail", *(["europe"] if more["region"] == "eu" else []))
    else:
        subscriptions = (_QUEUES.get(task, "work"),)
    arguments = {"label": name, **more}
    return Order(label=name, task=task, subscriptions=subscriptions, arguments=arguments, **options)  # type: ignore[arg-type]


def _fails(random: Random) -> int:
    """How many attempts fail."""
    return random.choice([0, 0, 1, 2])


def _shuffle_but_keys(random: Random, found: list[Order]) -> None:
    """In any order, but those with a key among themselves as they are."""
    keyed = iter([order for order in found if order.key is not None])
    random.shuffle(found)
    found[:] = [next(keyed) if order.key is not None else order for order in found]
