"""What will be done, and to whom harm: drawn from a seed, so that it can be done again."""

from __future__ import annotations

import hashlib
import random
from typing import Literal

import msgspec

Kind = Literal["transfer", "step", "event", "doomed"]
FaultKind = Literal["kill", "freeze", "cut", "restart"]
FAULTS: dict[FaultKind, int] = {"kill": 4, "freeze": 2, "cut": 2, "restart": 1}
"""How often each, for one of the last: the frozen and the restarted take long to come back."""

ACCOUNTS = 20
DEPOSIT = 1000
"""What each account holds at the beginning."""
MAX_ATTEMPTS = 5
"""Of errands that always fail."""
MAIL, AUDIT = "mail", "audit"
SUBSCRIPTIONS: dict[Kind, tuple[str, ...]] = {
    "transfer": ("transfers",), "step": ("steps",), "event": (MAIL, AUDIT), "doomed": ("doomed",),
}  # fmt: skip
"""Who gets an errand, without the name of the run."""


class Errand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message to be sent, and what its handler shall do."""

    token: str
    """Its name in the history, known before there is a message id."""
    at: float
    """Seconds after the beginning."""
    kind: Kind
    source: int = 0
    """Account."""
    target: int = 0
    amount: int = 0
    work: float = 0.0
    """Seconds before the effect, and again after it."""
    fails: int = 0
    """So many attempts fail; one that is doomed always does."""
    key: str | None = None
    """Of a step."""
    seq: int = 0
    """The step's place among those of its key, from 1."""
    idempotent: bool = False
    """Sent under an idempotency key, so that it may be sent again whenever the outcome is unknown."""
    shared: bool = False
    """Every producer sends it, under the same idempotency key."""
    outbox: bool = False
    """Written in a transaction of the effects' database, and sent by a relay."""
    rollback: bool = False
    """That transaction is rolled back: nobody must ever see the message."""

    @property
    def digest(self) -> str:
        """Tells one content from another."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One harm."""

    at: float
    kind: FaultKind
    target: str
    """The process, as ``worker-1``; or ``broker``."""
    lasts: float
    """Seconds: until a killed process is started again, or how long a frozen one stands still."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan depends on: the same options make the same plan."""

    seed: int
    seconds: float = 60.0
    """For which messages are sent and harm is done."""
    rate: float = 50.0
    """Messages a second, all producers together."""
    producers: int = 2
    workers: int = 3
    relays: int = 2
    faults: tuple[FaultKind, ...] = ()
    every: float = 2.0
    """Seconds between two faults, in the mean."""
    lease: float = 5.0
    """Seconds of the lease of all handlers; a frozen worker stands still for longer."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    options: Options
    errands: dict[str, list[Errand]]
    """By producer, in the order in which it sends them."""
    faults: list[Fault]

    def every_errand(self) -> dict[str, Errand]:
        """By token; a shared one once."""
        return {errand.token: errand for errands in self.errands.values() for errand in errands}


def names(role: str, count: int) -> list[str]:
    """``worker-1, worker-2 …``"""
    return [f"{role}-{number}" for number in range(1, count + 1)]


def make_plan(options: Options) -> Plan:
    """The whole schedule. Nothing but ``options`` decides it."""
    rng = random.Random(options.seed)
    producers = names("producer", options.producers)
    errands: dict[str, list[Errand]] = {name: [] for name in producers}
    steps: dict[str, int] = {}
    for number in range(int(options.seconds * options.rate)):
        producer = producers[number % len(producers)]
        errand = _errand(rng, producer, number, round(number / options.rate, 3), options, steps)
        for sender in producers if errand.shared else [producer]:
            errands[sender].append(errand)
    return Plan(options=options, errands=errands, faults=_faults(rng, options))


def _errand(
    rng: random.Random, producer: str, number: int, at: float, options: Options, steps: dict[str, int]
) -> Errand:
    token = f"{producer}/{number}"
    work = round(rng.uniform(0.01, 0.15), 4)
    fails = rng.choices((0, 1, 2), (85, 10, 5))[0]
    draw = rng.random()
    if draw < 0.05:
        return Errand(token=token, at=at, kind="doomed", work=work, idempotent=rng.random() < 0.5)
    if draw < 0.20:
        return Errand(token=token, at=at, kind="event", work=work, fails=fails, idempotent=rng.random() < 0.5)
    if draw < 0.45:
        return _step(rng, producer, token, at, work, fails, options, steps)
    source, target = rng.sample(range(ACCOUNTS), 2)
    plain = Errand(
        token=token,
        at=at,
        kind="transfer",
        source=source,
        target=target,
        amount=rng.randint(1, 100),
        work=work,
        fails=fails,
    )
    way = rng.random()
    if way < 0.35 and options.relays:
        return msgspec.structs.replace(plain, outbox=True, rollback=rng.random() < 0.25)
    if way < 0.45:
        return msgspec.structs.replace(plain, token=f"shared/{number}", idempotent=True, shared=True)
    return msgspec.structs.replace(plain, idempotent=way < 0.75)


def _step(
    rng: random.Random,
    producer: str,
    token: str,
    at: float,
    work: float,
    fails: int,
    options: Options,
    steps: dict[str, int],
) -> Errand:
    """A key belongs to one producer and one way of sending, so that its order is known."""
    outbox = bool(options.relays) and rng.random() < 0.4
    key = f"{producer}/{'outbox' if outbox else 'direct'}/{rng.randrange(3)}"
    steps[key] = steps.get(key, 0) + 1
    return Errand(
        token=token,
        at=at,
        kind="step",
        work=work,
        fails=fails,
        key=key,
        seq=steps[key],
        idempotent=not outbox,
        outbox=outbox,
    )


def _faults(rng: random.Random, options: Options) -> list[Fault]:
    found: list[Fault] = []
    at = 0.0
    while options.faults and (at := at + rng.uniform(0.5, 1.5) * options.every) < options.seconds:
        kind = rng.choices(options.faults, [FAULTS[each] for each in options.faults])[0]
        lasts = rng.uniform(1.5, 2.5) * options.lease if kind == "freeze" else rng.uniform(0.0, 1.0)
        target = "broker" if kind == "restart" else _target(rng, kind, options)
        found.append(Fault(at=round(at, 3), kind=kind, target=target, lasts=round(lasts, 3)))
    return found


def _target(rng: random.Random, kind: FaultKind, options: Options) -> str:
    # Mostly workers: they hold what can be lost. A frozen producer only sends later.
    roles = [("worker", options.workers, 6), ("relay", options.relays, 2)]
    if kind != "freeze":
        roles.append(("producer", options.producers, 2))
    role, count, _ = rng.choices(roles, [weight * bool(count) for _, count, weight in roles])[0]
    return rng.choice(names(role, count))
