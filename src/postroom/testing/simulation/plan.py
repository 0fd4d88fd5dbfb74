"""What is to be published in a run: drawn from the seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random

from postroom.testing.simulation.observed import Order


def orders(random: Random, *, joined: bool) -> list[list[Order]]:
    """One list a producer. ``joined``: some are published in transactions of the database."""
    first, second = list(_of_one(random, "a", joined)), list(_of_one(random, "b", joined))
    for producer in (first, second):
        _shuffle_but_keys(random, producer)
    shared = _order(random, "shared", "transfer", idempotency_key="shared")
    first.insert(random.randrange(len(first)), shared)
    second.insert(random.randrange(len(second)), shared)
    return [first, second]


def _of_one(random: Random, producer: str, joined: bool) -> Iterator[Order]:
    numbers = count(1)

    def name(task: str) -> str:
        return f"{task}-{producer}{next(numbers)}"

    for _ in range(random.randint(1, 4)):
        label = name("transfer")
        yield _order(random, label, "transfer", idempotency_key=random.choice([None, label]))
    for _ in range(random.randint(0, 2)):
        yield _order(random, name("transfer"), "transfer", delay=random.random() * 4.0)
    for _ in range(random.randint(0, 1)):
        yield _order(random, name("slow"), "slow")
    for _ in range(random.randint(0, 2)):
        yield _order(random, name("transfer"), "transfer", unwanted=True, delay=random.choice([0.0, 2.0]))
    for _ in range(random.randint(2, 5)):
        label = name("ordered")
        yield _order(random, label, "ordered", idempotency_key=label, key=f"key-{producer}")
    for _ in range(random.randint(0, 2)):
        yield _order(random, name("flaky"), "flaky")
    for _ in range(random.randint(0, 1)):
        yield _order(random, name("poison"), "poison")
    for _ in range(random.randint(0, 2)):
        yield _order(random, name("paid"), "paid")
    for _ in range(random.randint(0, 3) if joined else 0):
        yield _order(random, name("joined"), "transfer", joined=True, rolled_back=random.random() < 0.4)


def _order(random: Random, label: str, task: str, **options: object) -> Order:
    arguments: dict[str, object] = {"label": label}
    if task in ("transfer", "slow", "ordered"):
        arguments["amount"] = random.randint(1, 9)
    if task in ("ordered", "flaky"):
        arguments["fails"] = random.choice([0, 0, 1, 2])
    subscriptions = {"paid": ("audit", "mail"), "ordered": ("ordered",), "flaky": ("work",), "poison": ("work",)}
    return Order(
        label=label,
        task=task,
        subscriptions=subscriptions.get(task, ("payments",)),
        arguments=arguments,
        **options,  # type: ignore[arg-type]
    )


def _shuffle_but_keys(random: Random, found: list[Order]) -> None:
    """In any order, but those with a key among themselves as they are."""
    keyed = iter([order for order in found if order.key is not None])
    random.shuffle(found)
    found[:] = [next(keyed) if order.key is not None else order for order in found]
