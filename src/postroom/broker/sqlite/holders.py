"""Who is alive: every consuming process holds a lock on a file, in which it notes what it has claimed.

The operating system gives the lock back whatever kills the process, so whoever finds it free knows that its
holder is gone, and reads in the file which messages it had, and which of them it had started.
"""

from __future__ import annotations

import mmap
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody's death is seen, leases alone bring messages back.
    fcntl = None  # type: ignore[assignment]

SUPPORTED = fcntl is not None

_ENTRY = struct.Struct("<qqB7x")
_SEGMENT = 8192
"""Slots in one memory map: together a multiple of every page size."""
_STARTED_AT = 16

# POSIX locks belong to the process, and closing any descriptor of a file gives them up: files of this very
# process must never be opened by it a second time.
_own: dict[int, dict[str, Journal]] = {}


class Journal:
    """The file of this process: fixed slots of (seq, lease, started), in memory shared with the page cache.

    What is written here survives the death of the process at any instruction; it is not synced, for when the
    machine dies every lease is void anyway.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.path = directory / uuid.uuid4().hex
        # A file of its own for the lock: a memory map keeps a descriptor too, whose end would give the lock up.
        self._lock = os.open(lock_of(self.path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if fcntl is not None:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _own.setdefault(os.getpid(), {})[self.path.name] = self
        self._segments: list[mmap.mmap] = []
        self._free: list[int] = []

    def note(self, seq: int, lease: int) -> int:
        """Note a claim, before it is committed. Returns its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        _ENTRY.pack_into(self._segments[slot // _SEGMENT], slot % _SEGMENT * _ENTRY.size, seq, lease, 0)
        return slot

    def start(self, slot: int) -> None:
        """Note that the handler is about to run. From any thread."""
        self._segments[slot // _SEGMENT][slot % _SEGMENT * _ENTRY.size + _STARTED_AT] = 1

    def clear(self, slot: int) -> None:
        """The claim is settled, or was never committed."""
        _ENTRY.pack_into(self._segments[slot // _SEGMENT], slot % _SEGMENT * _ENTRY.size, 0, 0, 0)
        self._free.append(slot)

    def content(self) -> bytes:
        return b"".join(segment[:] for segment in self._segments)

    def close(self, *, keep: bool = False) -> None:
        """Give up the lock, and remove the file unless it is to be found by others."""
        for segment in self._segments:
            segment.close()
        os.close(self._descriptor)
        if not keep:
            remove(self.path)
        os.close(self._lock)
        _own.get(os.getpid(), {}).pop(self.path.name, None)

    def _grow(self) -> None:
        """One more segment. Those in use stay where they are: another thread may be writing to them."""
        size, first = _SEGMENT * _ENTRY.size, len(self._segments) * _SEGMENT
        os.ftruncate(self._descriptor, (len(self._segments) + 1) * size)
        self._segments.append(mmap.mmap(self._descriptor, size, offset=len(self._segments) * size))
        self._free = list(range(first, first + _SEGMENT))


def is_dead(path: Path) -> bool:
    """Whether the process that holds the file has died. A missing file is a dead one's.

    Of one that cannot be opened, another user's perhaps, nothing is known: its leases must end by themselves.
    """
    if fcntl is None or path.name in _own.get(os.getpid(), ()):
        return False
    try:
        descriptor = os.open(lock_of(path), os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def lock_of(path: Path) -> Path:
    """The file whose lock says that the holder of this journal lives."""
    return path.with_suffix(".lock")


def remove(path: Path) -> None:
    """A journal that nobody needs any more."""
    path.unlink(missing_ok=True)
    lock_of(path).unlink(missing_ok=True)


def claims(path: Path) -> Iterator[tuple[int, int, bool]]:
    """What a holder has noted: (seq, lease, started)."""
    own = _own.get(os.getpid(), {}).get(path.name)
    try:
        content = path.read_bytes() if own is None else own.content()
    except FileNotFoundError:
        return
    for seq, lease, started in _ENTRY.iter_unpack(content[: len(content) // _ENTRY.size * _ENTRY.size]):
        if lease:
            yield seq, lease, bool(started)
