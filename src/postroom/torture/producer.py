"""A producer: sends its errands in order, notes what it was told, and goes on where a killed one stopped."""

from __future__ import annotations

import time
from typing import Any

from postroom.errors import BrokerUnavailable, PostroomError, PublishFailed
from postroom.testing.history import Event, Result, load
from postroom.torture.app import TASKS, app, events, place
from postroom.torture.effects import Effects
from postroom.torture.plan import Errand
from postroom.torture.recorder import TOKEN

_PAUSE = 0.2
"""Seconds before what had no outcome is sent again."""


class Producer:
    def __init__(self, name: str) -> None:
        """``name``: as in the plan, without the generation."""
        self._errands = place.settings.plan.errands[name]
        self._effects = Effects(place.effects)
        self._before = self._told_before(name)
        self._ordered = self._effects.ordered()

    def run(self) -> None:
        self._connect()
        place.tell_ready()
        begin = place.wait_for_begin()
        for errand in self._errands:
            if not self._is_done(errand):
                time.sleep(max(0.0, begin + errand.at - time.monotonic()))
                self._send(errand)
        self._effects.close()

    @staticmethod
    def _connect() -> None:
        while True:
            try:
                return app.connect()
            except BrokerUnavailable:
                time.sleep(_PAUSE)

    @staticmethod
    def _told_before(name: str) -> dict[str, Result]:
        """The latest outcome of each errand in the files of those who had this name before."""
        files = (place.folder / "history").glob(f"{name}.*.jsonl")
        return {event.id: event.outcome for event in load(files) if event.op == "publish"}

    def _is_done(self, errand: Errand) -> bool:
        outcome = self._before.get(errand.token)
        if outcome in ("ok", "fail") or outcome is None:
            return outcome is not None
        if errand.outbox:
            # Whoever wrote it is dead, and so is the transaction: what is not there by now never will be.
            return errand.token in self._ordered
        return not errand.idempotent

    def _send(self, errand: Errand) -> None:
        while True:
            self._note(errand, "invoke")
            try:
                message = self._publish(errand)
            except (BrokerUnavailable, PublishFailed):
                self._note(errand, "info")
                if not (errand.idempotent or errand.outbox):
                    return
                time.sleep(_PAUSE)
            except PostroomError:
                self._note(errand, "fail")
                raise
            else:
                self._note(errand, "fail" if errand.rollback else "ok", message)
                return

    def _publish(self, errand: Errand) -> str:
        """Returns the message's id."""
        if errand.outbox:
            rollback = errand.rollback and place.settings.plant != "ignore-rollback"
            return self._effects.order(errand.token, lambda c: self._enqueue(errand, c), rollback=rollback)
        return self._enqueue(errand)

    def _enqueue(self, errand: Errand, transaction: Any = None) -> str:
        using: dict[str, Any] = {"headers": {TOKEN: errand.token}, "key": errand.key, "transaction": transaction}
        if errand.idempotent:
            using["idempotency_key"] = errand.token
        if errand.kind == "event":
            return events.using(**using).publish(errand).id
        return TASKS[errand.kind].using(**using).enqueue(errand).id

    def _note(self, errand: Errand, outcome: Result, message: str = "") -> None:
        place.note(
            Event(
                t=time.monotonic(),
                op="publish",
                id=errand.token,
                consumer=place.actor,
                outcome=outcome,
                key=errand.key,
                message=message,
            )
        )
