"""One run: processes up, harm, healing, draining, and everything that can be known afterwards."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

from postroom.app import App
from postroom.broker.base import Broker, Capabilities, SubscriptionStats
from postroom.errors import BrokerUnavailable, ConfigurationError, PostroomError, SubscriptionNotFound
from postroom.message import DeadLetter
from postroom.testing.history import Event, History, load
from postroom.torture.effects import Effect, Effects
from postroom.torture.nemesis import Nemesis
from postroom.torture.plan import SUBSCRIPTIONS, Plan
from postroom.torture.processes import Actor, Cast, Ended
from postroom.torture.settings import BEGIN, EFFECTS, FOLDER, Settings, history_file
from postroom.torture.tail import Tail

_TICK = 0.05
_STANDSTILL = 20.0
"""Seconds without any progress, beyond four leases, after which what is left will never come."""
_UNCOUNTED = 200.0
"""The same where the broker does not count all that is on its way: RabbitMQ repeats after 3 minutes what it had moved
from queue to queue, unconfirmed, when it was killed."""
_STARTUP = 60.0
"""Seconds for all processes to come up."""
_DRAIN = 600.0
"""Seconds after which it is over in any case."""

Progress = Callable[[str, float, Tail], None]
"""Told what goes on, the share that is done, and the counts."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that is left of a run."""

    plan: Plan
    run: str
    begin: float
    healed: float
    """Monotonic seconds at which the harm was over."""
    drained: float | None
    """Monotonic seconds at which nothing was left; ``None`` if something was."""
    history: list[Event]
    journal: list[Effect]
    balances: list[int]
    ordered: set[str]
    """Tokens of the orders that were committed."""
    dead: list[DeadLetter]
    stats: list[SubscriptionStats]
    ended: list[Ended]
    capabilities: Capabilities
    atomic: bool
    """The broker itself keeps what is known of a message, and changes it together with the message."""


class Run:
    """On the broker at ``url``, with the effects in another database."""

    def __init__(
        self,
        plan: Plan,
        url: str,
        *,
        store: str | None,
        effects: str,
        folder: Path,
        restart: str | None = None,
        plant: str | None = None,
    ) -> None:
        """``folder``: exists, and is empty. ``restart``: see ``Nemesis``."""
        self._plan = plan
        self._folder = folder
        self._restart = restart
        self._plant = plant
        self._effects = Effects(effects)
        self._name = f"torture-{secrets.token_hex(4)}"
        self._app = App(url, store=store)
        self._stored = store is not None
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("POSTROOM")},
            "POSTROOM_BROKER": url,
            FOLDER: str(folder),
            EFFECTS: effects,
        }
        if store is not None:
            self._environment["POSTROOM_STORE"] = store

    def run(self, progress: Progress) -> Evidence:
        """Do it all. Raises ``PostroomError`` if it cannot be done; what came out is for the checker."""
        for name in ("history", "ready"):
            (self._folder / name).mkdir()
        self._effects.create()
        with self._app, closing(self._effects), history_file(self._folder, "nemesis") as history:
            capabilities = self._app.make_broker().capabilities
            self._app.connect()
            try:
                return self._play(history, progress, capabilities)
            finally:
                self._clean()

    def _play(self, history: History, progress: Progress, capabilities: Capabilities) -> Evidence:
        Settings(plan=self._plan, run=self._name, plant=self._plant).save(self._folder)
        tail = Tail(self._folder / "history")
        with Cast(self._plan.options, self._folder, self._environment) as cast:
            begin = self._begin(cast, lambda share: progress("starting", share, tail), history)
            nemesis = Nemesis(self._plan.faults, cast, begin=begin, restart=self._restart, note=history.note)
            try:
                self._harm(cast, nemesis, begin, lambda share: progress("under fault", share, tail), tail, history)
                nemesis.heal()
            finally:
                nemesis.close()
            healed = time.monotonic()
            drained = self._drain(
                cast, tail, lambda share: progress("draining", share, tail), history, exact=capabilities.exact_stats
            )
        return Evidence(
            plan=self._plan,
            run=self._name,
            begin=begin,
            healed=healed,
            drained=drained,
            history=load((self._folder / "history").glob("*.jsonl")).events,
            journal=self._effects.journal(),
            balances=self._effects.balances(),
            ordered=self._effects.ordered(),
            dead=[letter for name in self.subscriptions for letter in self._dead_letters(name)],
            stats=self._stats(),
            ended=cast.ended,
            capabilities=capabilities,
            atomic=not self._stored,
        )

    @property
    def subscriptions(self) -> list[str]:
        return [f"{self._name}-{name}" for names in SUBSCRIPTIONS.values() for name in names]

    def _begin(self, cast: Cast, progress: Callable[[float], None], history: History) -> float:
        """Wait until all are up, then give the sign. Returns when. Raises ``PostroomError``."""
        deadline = time.monotonic() + _STARTUP
        missing = {actor.name for actor in cast if actor.role != "relay"}
        while waited_for := missing - {path.name for path in (self._folder / "ready").iterdir()}:
            now = time.monotonic()
            cast.tend(now, lambda actor: _note_end(history, actor))
            if now > deadline:
                tails = "\n".join(cast.actors[name].tail() for name in sorted(waited_for))
                raise PostroomError(f"{', '.join(sorted(waited_for))} did not come up:\n{tails}")
            progress(1 - len(waited_for) / len(missing))
            time.sleep(_TICK)
        begin = time.monotonic()
        # Moved there whole: whoever sees the file can read it.
        draft = self._folder / f"{BEGIN}.draft"
        draft.write_text(str(begin))
        draft.rename(self._folder / BEGIN)
        return begin

    def _harm(
        self,
        cast: Cast,
        nemesis: Nemesis,
        begin: float,
        progress: Callable[[float], None],
        tail: Tail,
        history: History,
    ) -> None:
        end = begin + self._plan.options.seconds
        while (now := time.monotonic()) < end:
            nemesis.tick(now)
            cast.tend(now, lambda actor: _note_end(history, actor))
            tail.look()
            progress((now - begin) / self._plan.options.seconds)
            time.sleep(_TICK)

    def _drain(
        self, cast: Cast, tail: Tail, progress: Callable[[float], None], history: History, *, exact: bool
    ) -> float | None:
        """Until two looks found nothing left. ``None`` if nothing goes on for too long.

        ``exact``: the broker's numbers are right at once; else they are not trusted when they say that it is empty.
        """
        begin = moved = time.monotonic()
        known, empty = -1, 0
        patience = (_STANDSTILL if exact else _UNCOUNTED) + 4 * self._plan.options.lease
        while empty < 2:
            now = time.monotonic()
            cast.tend(now, lambda actor: _note_end(history, actor))
            tail.look()
            if len(tail.ended) + len(tail.sent) != known:
                known, moved = len(tail.ended) + len(tail.sent), now
            if now > moved + patience or now > begin + _DRAIN:
                return None
            left = self._left(cast) + (0 if exact else self._unended(tail))
            empty = 0 if left else empty + 1
            progress(1 - min(left / max(len(tail.sent), 1), 1.0))
            time.sleep(4 * _TICK)
        return time.monotonic()

    def _left(self, cast: Cast) -> int:
        """Messages on their way, and producers that have not ended."""
        try:
            waiting = sum(each.ready + each.delayed + each.running for each in self._stats())
        except BrokerUnavailable:
            return 1  # It is coming up: nothing is known to be done.
        return waiting + self._effects.waiting() + cast.producing

    def _unended(self, tail: Tail) -> int:
        """Confirmed messages that nobody has settled."""
        errands = self._plan.every_errand()
        due = {(token, f"{self._name}-{name}") for token in tail.sent for name in SUBSCRIPTIONS[errands[token].kind]}
        return len(due - tail.ended)

    def _stats(self) -> list[SubscriptionStats]:
        return [each for each in self._app.stats() if each.name in self.subscriptions]

    def _dead_letters(self, subscription: str) -> list[DeadLetter]:
        box = self._app.dead_letters(subscription)
        found: list[DeadLetter] = []
        try:
            while page := box.list(after=found[-1].message.id if found else None):
                found += page
        except SubscriptionNotFound:
            return []  # No process came as far as to declare it.
        return found

    def _clean(self) -> None:
        """Leave nothing on a broker that others use, and nothing in the database of the effects."""

        async def remove(broker: Broker) -> None:
            for name in self.subscriptions:
                try:
                    await broker.unsubscribe(name)
                except SubscriptionNotFound:
                    continue

        self._app.thread.call(remove)
        self._effects.drop()


def _note_end(history: History, actor: Actor) -> None:
    history.note(Event(t=time.monotonic(), op="crash", id=actor.id))


def needs_store(url: str) -> bool:
    """Whether the broker at ``url`` keeps no status itself. Raises ``ConfigurationError`` if it cannot be shared."""
    capabilities = App(url).make_broker().capabilities
    if not capabilities.shared:
        raise ConfigurationError(
            f"{url.partition('://')[0]}:// lives in one process, and the torture kills processes; name another broker"
        )
    return not capabilities.jobs
