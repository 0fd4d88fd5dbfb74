"""A machine whose time, threads and processes exist only here, and go the same way whenever the seed is the same."""

from __future__ import annotations

import asyncio
import heapq
import math
import select
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from postroom.testing.simulation.lane import Lane
from postroom.testing.simulation.trace import Trace

if TYPE_CHECKING:
    from concurrent.futures import Future

    from postroom.testing.simulation.faults import Faults

T = TypeVar("T")

START = 1_750_000_000.0
"""The wall clock at the beginning, in unix seconds."""
_UPTIME = 1_000.0
_FIRST_PID = 1_001
_STEP_TIME = 20e-6
"""Seconds, on average, that a step takes: things that begin together do not stay together."""


class Died(BaseException):
    """Raised where a process dies in the middle of a step; nothing it still does has any effect."""


class Stuck(Exception):
    """The run does not come to its end."""


class Process:
    """A process: lanes (its threads' event loops), and what the operating system closes when it ends."""

    def __init__(self, machine: Machine, name: str, pid: int) -> None:
        self.machine = machine
        self.name = name
        self.role = name.partition(".")[0].rstrip("0123456789")
        self.pid = pid
        self.dead = False
        self.frozen_until = 0.0
        self.mortal = True
        """Whether faults may strike it."""
        self.exposed = 0
        """Steps for which faults are more probable."""
        self.troubles: list[tuple[float, float]] = []
        """Times in which it was frozen, cut off or told to stop."""
        self.closers: list[Callable[[], None]] = []
        self.lanes: list[Lane] = []
        self.main = self.add_lane("main")

    def add_lane(self, name: str) -> Lane:
        lane = Lane(self.machine, self, name)  # type: ignore[abstract]  # what is not there is not used
        self.lanes.append(lane)
        self.machine.lanes.append(lane)
        return lane

    @property
    def frozen(self) -> bool:
        return self.frozen_until > self.machine.monotonic


class Machine:
    """Runs one step at a time, of a lane that the seed chooses; time jumps when nothing is ready."""

    def __init__(self, seed: str, trace: Trace, faults: Faults, *, max_steps: int) -> None:
        self.monotonic = _UPTIME
        self.wall_offset = START - _UPTIME
        self.trace = trace
        self.faults = faults
        self.lanes: list[Lane] = []
        self.steps = 0
        self.io_happened = False
        """Since the last look at what is watched: a file may have changed."""
        self.complaints: list[str] = []
        self._max_steps = max_steps
        self._random = Random(f"{seed}/schedule")
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Lane]] = []
        self._order = count()
        self._pids = count(_FIRST_PID)
        self._poll = select.poll()
        self._watched: dict[int, Lane] = {}
        self.everyone: list[Process] = []
        self._current: list[Process] = []

    @property
    def wall(self) -> float:
        """What the machine's clock shows, in unix seconds."""
        return self.monotonic + self.wall_offset

    @property
    def current(self) -> Process | None:
        """Whose step it is."""
        return self._current[-1] if self._current else None

    # Processes

    def spawn(self, name: str) -> Process:
        process = Process(self, name, next(self._pids))
        self.everyone.append(process)
        self.note(process, "starts")
        return process

    def kill(self, process: Process, why: str = "killed") -> None:
        """The process is gone at once; the operating system closes what it had open."""
        if process.dead:
            return
        self.note(process, why)
        process.dead = True
        self.lanes = [lane for lane in self.lanes if lane.process is not process]
        with self._as(process):
            for close in reversed(process.closers):
                close()

    def freeze(self, process: Process, seconds: float) -> None:
        """Nothing of it runs for so long, and it does not know."""
        self.note(process, f"frozen for {seconds:.2f} s")
        process.frozen_until = max(process.frozen_until, self.monotonic + seconds)
        process.troubles.append((self.monotonic, process.frozen_until))

    def terminate(self, process: Process) -> None:
        """SIGTERM, to whoever listens."""
        self.note(process, "SIGTERM")
        process.troubles.append((self.monotonic, math.inf))
        listener = process.main.signals.get(signal.SIGTERM)
        if listener is None:
            self.kill(process, "ended by SIGTERM")
        else:
            process.main.call_soon(listener[0], *listener[1])

    def thaw_all(self) -> None:
        for process in self.everyone:
            process.frozen_until = 0.0

    def bury(self) -> None:
        """After the end: let everything go that still waits."""
        for process in self.everyone:
            self.kill(process, "ends with the machine")
        for process in self.everyone:
            for lane in process.lanes:
                lane.bury()

    # Steps

    def run(self, process: Process, main: Coroutine[Any, Any, T]) -> T:
        """Until ``main``, run in ``process``, has ended. Raises ``Stuck`` if that takes too many steps."""
        task = process.main.create_task(main)
        while not task.done():
            self._step()
        result: T = task.result()
        return result

    def wait(self, future: Future[T]) -> T:
        """As a thread does that waits for another one: everything else goes on until the answer is there."""
        process = self.current
        assert process is not None
        lane = asyncio.get_running_loop()
        assert isinstance(lane, Lane)
        task = asyncio.current_task()
        lane.blocked = True
        if task is not None:
            asyncio._leave_task(lane, task)
        try:
            while not future.done() or process.frozen:
                if process.dead:
                    raise Died
                self._step()
        finally:
            lane.blocked = False
            if task is not None:
                asyncio._enter_task(lane, task)
        return future.result()

    def add_timer(self, timer: asyncio.TimerHandle, lane: Lane) -> None:
        heapq.heappush(self._timers, (timer.when(), next(self._order), timer, lane))

    def watch(self, fd: int, lane: Lane) -> None:
        """Files are watched by the real kernel, which answers at once: what is written is seen at the next look."""
        self._poll.register(fd, select.POLLIN)
        self._watched[fd] = lane

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def spend(self, seconds: float) -> None:
        """Let up to ``seconds`` pass, by chance."""
        self.monotonic += self._random.random() * seconds

    def note(self, process: Process | None, what: str) -> None:
        self.trace.add(self.monotonic - _UPTIME, process.name if process else "machine", what)

    def complain(self, process: Process, context: dict[str, Any]) -> None:
        """asyncio found an error that nobody took."""
        error = context.get("exception")
        if not process.dead and not isinstance(error, Died):
            self.complaints.append(f"{process.name}: {context.get('message')}: {error!r}")

    def _step(self) -> None:
        self._look_at_watches()
        lane = self._next_lane()
        self.steps += 1
        if self.steps > self._max_steps:
            raise Stuck(f"after {self.steps:,} steps, {self.monotonic - _UPTIME:.1f} s")
        self.monotonic += self._random.random() * 2 * _STEP_TIME
        if lane.process.mortal and self.faults.before_step(lane.process):
            return
        handle = lane.ready.popleft()
        if handle.cancelled():
            return
        if self.trace.detailed:
            self.trace.add(self.monotonic - _UPTIME, lane.name, describe(handle))
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(lane)
        self._current.append(lane.process)
        handle._run()
        self._current.pop()
        asyncio._set_running_loop(before)

    @contextmanager
    def _as(self, process: Process) -> Iterator[None]:
        self._current.append(process)
        try:
            yield
        finally:
            self._current.pop()

    def _next_lane(self) -> Lane:
        while True:
            self._ring()
            able = [lane for lane in self.lanes if lane.ready and not lane.blocked and not lane.process.frozen]
            if able:
                return able[0] if len(able) == 1 else self._random.choice(able)
            self._jump()

    def _ring(self) -> None:
        """Timers whose time has come."""
        timers = self._timers
        while timers and timers[0][0] <= self.monotonic:
            _, _, timer, lane = heapq.heappop(timers)
            if not timer.cancelled() and not lane.process.dead:
                lane.ready.append(timer)

    def _jump(self) -> None:
        """To the next moment at which something can happen."""
        while self._timers and (self._timers[0][2].cancelled() or self._timers[0][3].process.dead):
            heapq.heappop(self._timers)
        times = [lane.process.frozen_until for lane in self.lanes if lane.ready and lane.process.frozen]
        if self._timers:
            times.append(self._timers[0][0])
        if not times:
            raise Stuck(f"nothing can happen any more, after {self.monotonic - _UPTIME:.1f} s")
        self.monotonic = max(self.monotonic, min(times))

    def _look_at_watches(self) -> None:
        if not self.io_happened or not self._watched:
            return
        self.io_happened = False
        for fd, _ in sorted(self._poll.poll(0)):
            lane = self._watched[fd]
            handle = lane.readers[fd]
            if handle not in lane.ready:
                lane.ready.append(handle)


def describe(handle: asyncio.Handle) -> str:
    """The callback, without addresses: equal in every run of the same seed."""
    callback: Any = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return f"step of {owner.get_coro().__qualname__}"  # type: ignore[union-attr]
    return str(getattr(callback, "__qualname__", type(callback).__name__))
