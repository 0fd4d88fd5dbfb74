"""The app under torture. Imported only by the processes of a run, which find their settings in the environment."""

from __future__ import annotations

import time
from collections.abc import Iterator

from postroom import INJECTED, App, Context, RetryPolicy, exponential
from postroom.broker.base import Broker
from postroom.signals import AlreadyProcessed
from postroom.testing.history import Event, Operation, Result
from postroom.torture.effects import Effects
from postroom.torture.plan import AUDIT, MAIL, MAX_ATTEMPTS, Errand
from postroom.torture.plants import PLANTS, plant_in
from postroom.torture.recorder import RecordingBroker
from postroom.torture.settings import Place

place = Place()
RUN, LEASE, PLANT = place.settings.run, place.settings.plan.options.lease, place.settings.plant
MANY = RetryPolicy(max_attempts=1000, backoff=exponential(first=0.1, max=1.0))
"""Deaths count as failures: what shall succeed in the end must not run out of attempts."""
FEW = RetryPolicy(max_attempts=MAX_ATTEMPTS, backoff=exponential(first=0.1, max=1.0))


class TortureApp(App):
    """Records what its brokers do; with a plant they have a defect."""

    def make_broker(self) -> Broker:
        broker = super().make_broker()
        planted = PLANTS[PLANT].broker if PLANT else None
        return RecordingBroker(planted(broker) if planted else broker, place.actor, place.note)


app = TortureApp()
plant_in(app, PLANT, place.actor)
events = app.topic(f"{RUN}-events", Errand, retention=0)


class Planned(Exception):
    """A failure that the plan wants."""


@app.resource
def effects() -> Iterator[Effects]:
    made = Effects(place.effects)
    place.tell_ready()
    yield made
    made.close()


@app.task(queue=f"{RUN}-transfers", retry=MANY, lease=LEASE)
def transfer(errand: Errand, ctx: Context = INJECTED, effects: Effects = INJECTED) -> None:
    _handle(errand, ctx, effects)


@app.task(queue=f"{RUN}-steps", retry=MANY, lease=LEASE, ordered=True)
def step(errand: Errand, ctx: Context = INJECTED, effects: Effects = INJECTED) -> None:
    _handle(errand, ctx, effects)


@app.task(queue=f"{RUN}-doomed", retry=FEW, lease=LEASE)
def doomed(errand: Errand, ctx: Context = INJECTED, effects: Effects = INJECTED) -> None:
    _handle(errand, ctx, effects)


@events.subscribe(f"{RUN}-{MAIL}", retry=MANY, lease=LEASE)
def mail(errand: Errand, ctx: Context = INJECTED, effects: Effects = INJECTED) -> None:
    _handle(errand, ctx, effects)


@events.subscribe(f"{RUN}-{AUDIT}", retry=MANY, lease=LEASE)
def audit(errand: Errand, ctx: Context = INJECTED, effects: Effects = INJECTED) -> None:
    _handle(errand, ctx, effects)


TASKS = {"transfer": transfer, "step": step, "doomed": doomed}


def _handle(errand: Errand, ctx: Context, effects: Effects) -> None:
    _note("start", errand, ctx)
    try:
        if errand.kind == "doomed" or ctx.attempt <= errand.fails:
            time.sleep(errand.work)
            raise Planned(errand.token)
        _effect(errand, ctx, effects)
    except AlreadyProcessed:
        _note("end", errand, ctx)
        raise
    except BaseException:
        _note("end", errand, ctx, "fail")
        raise
    _note("end", errand, ctx)


def _effect(errand: Errand, ctx: Context, effects: Effects) -> None:
    if PLANT == "mark-before-effect":
        with effects.engine.begin() as connection:
            ctx.once(connection)
    time.sleep(errand.work)
    with effects.engine.begin() as connection:
        if PLANT not in ("mark-before-effect", "no-inbox"):
            ctx.once(connection)
        effects.apply(connection, errand, ctx)
    time.sleep(errand.work)


def _note(operation: Operation, errand: Errand, ctx: Context, outcome: Result = "ok") -> None:
    place.note(
        Event(
            t=time.monotonic(),
            op=operation,
            id=errand.token,
            sub=ctx.subscription,
            attempt=ctx.attempt,
            consumer=place.actor,
            outcome=outcome,
            key=errand.key,
            digest=errand.digest,
            message=ctx.job_id,
        )
    )
