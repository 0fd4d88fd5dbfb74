"""Known bugs, to be planted: they prove that the simulation would find them."""

from __future__ import annotations

from typing import Any

from postroom.context import Context
from postroom.testing.defects import delivering
from postroom.testing.simulation.app import SimulatedApp
from postroom.testing.simulation.world import Setting


class _MarksFirst(SimulatedApp):
    def _mark(self, ctx: Context, connection: Any) -> None:
        ctx.once(connection)
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")


class _MarksNothing(SimulatedApp):
    def _mark(self, ctx: Context, connection: Any) -> None:
        """Duplicates are not told from the first."""


PLANTS: dict[str, Setting] = {
    "early-ack": Setting(broker=delivering.AcksEarly),
    "no-fence": Setting(broker=delivering.HasNoFencing),
    "no-renewal": Setting(broker=delivering.ExtendsNothing),
    "no-start-notes": Setting(broker=delivering.ForgetsDeaths),
    "mark-before-effect": Setting(app=_MarksFirst),
    "no-mark": Setting(app=_MarksNothing),
}
