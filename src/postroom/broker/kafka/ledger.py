"""What of one partition is done, what is handed out, and whom a death is charged to. Nothing here does I/O.

A consumer group remembers one offset a partition: all before it is done. Messages end in any order, so the rest of
the truth travels in the text that Kafka keeps with a committed offset, 4,096 bytes at most by default
(``offset.metadata.max.bytes``): which later offsets are done, which are handed out, which were started, and how
often a holder died with one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

ROOMY = 100
"""Ranges beyond which what waits for its time should be moved away."""
FULL = 200
"""Ranges beyond which only that is handed out which makes them fewer: their text must fit."""

_VERSION = "p1"


class Ledger:
    """Of one partition. Offsets below ``prefix`` are done; those from ``next`` on were not seen yet."""

    def __init__(self, prefix: int | None = None) -> None:
        self.prefix = prefix
        """``None`` until the first record tells where the log begins."""
        self.next = prefix
        self.out: dict[int, bool] = {}
        """What is handed out, and whether it was started."""
        self.deaths: dict[int, int] = {}
        """Suspects, and how many deaths of their holders are charged to each."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._told: list[bool] = []
        """Whether the next holder must hear of it, or would skip it by itself."""
        self._tellings = 0

    def see(self, offset: int) -> bool:
        """A record came. Returns whether it is to be done; offsets skipped before it do not exist."""
        if self.prefix is None or self.next is None:
            self.prefix = self.next = offset
        if offset < self.next:
            return False
        if offset > self.next:
            self._end(self.next, offset, told=False)
        self.next = offset + 1
        return not self.is_done(offset)

    def is_done(self, offset: int) -> bool:
        if self.prefix is None or offset < self.prefix:
            return self.prefix is not None
        at = bisect_right(self._starts, offset) - 1
        return at >= 0 and offset < self._ends[at]

    def complete(self, offset: int) -> None:
        """It is done for good."""
        self.out.pop(offset, None)
        self.deaths.pop(offset, None)
        self._end(offset, offset + 1, told=True)

    def skip(self, offset: int) -> None:
        """Nobody here wants it, nor will who comes next. There may be thousands between those that wait."""
        self._end(offset, offset + 1, told=False)

    @property
    def resume(self) -> int | None:
        """Where to read on: what was done by a former holder may be ahead of what was seen."""
        return None if self.next is None or self.prefix is None else max(self.next, self.prefix)

    def has_room(self, offset: int) -> bool:
        """Whether the text fits if this is handed out.

        It has room for a suspect, which is in it already, and for what comes first, whose end makes the prefix longer.
        Without them a full text would stay full: nothing of the partition would ever be done again.
        """
        return self.ranges < FULL or offset in self.deaths or offset == self.prefix

    def hand_out(self, offset: int) -> None:
        """A suspect counts as started at once: it may kill before a note of its start is kept."""
        self.out[offset] = offset in self.deaths

    def give_back(self, offset: int) -> None:
        self.out.pop(offset, None)

    def died(self, offset: int, *, started: bool) -> None:
        """Its holder died or froze. What had not started is not charged."""
        self.out.pop(offset, None)
        if started:
            self.deaths[offset] = self.deaths.get(offset, 0) + 1

    @property
    def ranges(self) -> int:
        """How many ranges the text has: its length is at most about 18 bytes for each."""
        return self._tellings + len(self.deaths) + len(self.out)

    @property
    def last_done(self) -> int:
        """The end of the last range beyond the prefix that the text has."""
        return max((end for _, end in self._done()), default=self.prefix or 0)

    def text(self, tag: str, *, released: bool = False) -> str:
        """All of it but the prefix. ``released``: as if nothing were handed out. ``tag`` names the writer."""
        base = self.prefix or 0
        out = {} if released else self.out
        parts = [
            _written(self._done(), base),
            _written(_ranges(offset for offset, started in out.items() if not started), base),
            _written(_ranges(offset for offset, started in out.items() if started), base),
            ",".join(f"{offset - base:x}:{count:x}" for offset, count in self.deaths.items()),
        ]
        return ";".join([_VERSION, tag, *parts])

    @staticmethod
    def writer(text: str | None) -> str:
        """Who has written it."""
        fields = (text or "").split(";")
        return fields[1] if fields[0] == _VERSION and len(fields) == 6 else ""

    @classmethod
    def read(cls, prefix: int | None, text: str | None) -> Ledger:
        """What the committed offset and its text say. A text of somebody else says nothing."""
        ledger = cls(prefix)
        fields = (text or "").split(";")
        if prefix is None or not cls.writer(text):
            return ledger
        try:
            done, out, started = (list(_read(field, prefix)) for field in fields[2:5])
            pairs = [pair.split(":") for pair in fields[5].split(",") if pair]
            deaths = {prefix + int(offset, 16): int(count, 16) for offset, count in pairs}
        except ValueError:
            return ledger
        for span in done:
            ledger._end(*span, told=True)
        for spans, note in ((out, False), (started, True)):
            ledger.out.update((offset, note) for span in spans for offset in range(*span))
        ledger.deaths.update(deaths)
        return ledger

    def take_over(self) -> None:
        """The former holder has died: charge what it had started, and suspect all it held.

        The note of a start follows the start by some milliseconds. What was handed out without one may have
        killed in that time: it is not charged, but from now on it is a suspect, and next time it is.
        """
        for offset, started in list(self.out.items()):
            self.died(offset, started=started)
            self.deaths.setdefault(offset, 0)

    def _done(self) -> Iterator[tuple[int, int]]:
        return ((start, end) for start, end, told in zip(self._starts, self._ends, self._told, strict=True) if told)

    def _end(self, start: int, end: int, *, told: bool) -> None:
        if self.prefix is None:
            self.prefix = self.next = start
        if start <= self.prefix:
            self.prefix = max(self.prefix, end)
        else:
            at = bisect_right(self._starts, start)
            if at and self._ends[at - 1] >= start:
                at -= 1
                start, end = self._starts[at], max(end, self._ends[at])
            last = bisect_right(self._starts, end)
            end = max(end, self._ends[last - 1]) if last > at else end
            merged = sum(self._told[at:last])
            told = told or merged > 0
            self._tellings += told - merged
            self._starts[at:last], self._ends[at:last], self._told[at:last] = [start], [end], [told]
        while self._starts and self._starts[0] <= self.prefix:
            self.prefix = max(self.prefix, self._ends.pop(0))
            self._starts.pop(0)
            self._tellings -= self._told.pop(0)


def _ranges(offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for offset in sorted(offsets):
        if offset != end:
            if end >= 0:
                yield start, end
            start = offset
        end = offset + 1
    if end >= 0:
        yield start, end


def _written(ranges: Iterable[tuple[int, int]], base: int) -> str:
    """Each as the gap before it and its length."""
    words = []
    for start, end in ranges:
        words.append(f"{start - base:x}+{end - start:x}")
        base = end
    return ",".join(words)


def _read(text: str, base: int) -> Iterator[tuple[int, int]]:
    for word in filter(None, text.split(",")):
        gap, _, length = word.partition("+")
        start = base + int(gap, 16)
        base = start + int(length, 16)
        yield start, base
