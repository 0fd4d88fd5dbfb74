"""What can be wrong with a SQLite file, its folder, its disk and the library. Only looks."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from postroom.broker.sqlite import mounts
from postroom.broker.sqlite.engine import BUSY_DEADLINE, Engine, translate
from postroom.broker.sqlite.holders import SUPPORTED
from postroom.doctor import Finding

MEBIBYTE = 1 << 20
LEAST_ROOM = 100 * MEBIBYTE
"""Bytes free below which it is only a matter of time until producers are refused."""
LITTLE_ROOM = 1024 * MEBIBYTE
LARGE_LOG = 64 * MEBIBYTE
"""Four times what the log grows to before it is copied into the file, if nothing prevents that."""
CHECK_TIME = 10.0
"""Seconds for the check of the whole file."""

_FILES = ("", "-wal", "-shm", ".bell", ".holders")
_SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(3)
"""
_REFUSED = 3


async def examine(engine: Engine, *, version: int) -> list[Finding]:
    """Everything about the file of ``engine``, connected or not. ``version``: the schema it should have."""
    findings = [library(sqlite3.sqlite_version_info[:3])]
    if engine.connected:
        findings.append(syncing(int(engine.connection.execute("PRAGMA synchronous").fetchone()[0])))
    return findings + await asyncio.to_thread(lambda: list(_look_at(engine.path, version)))


def library(version: tuple[int, ...]) -> Finding:
    """https://www.sqlite.org/wal.html#walresetbug: fixed in 3.51.3, and in 3.44.6 and 3.50.7 of older lines."""
    title, name = "SQLite library", ".".join(map(str, version))
    if version >= (3, 51, 3) or any(version[:2] == line[:2] and version >= line for line in ((3, 44, 6), (3, 50, 7))):
        return Finding(level="ok", title=title, detail=name)
    return Finding(
        level="warning",
        title=title,
        detail=f"{name} can, very rarely, damage a file that several processes write to (sqlite.org: WAL-reset bug); "
        "your system may have repaired it without changing the number",
        remedy="use a Python or system with SQLite 3.51.3 or newer (or 3.50.7, 3.44.6); keep backups",
    )


def syncing(synchronous: int) -> Finding:
    """``synchronous``: the number of https://www.sqlite.org/pragma.html#pragma_synchronous."""
    title, name = "syncing", _SYNCHRONOUS[synchronous]
    if name in ("FULL", "EXTRA"):
        return Finding(level="ok", title=title, detail=f"every commit waits for the disk (synchronous = {name})")
    return Finding(
        level="error",
        title=title,
        detail=f"synchronous = {name}: a power cut loses messages that were confirmed",
        remedy="remove whatever sets PRAGMA synchronous on the broker's connection; Postroom sets FULL",
    )


def room(free: int, used: int) -> Finding:
    """``free``: bytes of the file system; ``used``: bytes of the database."""
    title, detail = "free disk space", f"{_size(free)} free, the database takes {_size(used)}"
    remedy = "make room or move the file: on a full disk producers are refused"
    if free < LEAST_ROOM:
        return Finding(level="error", title=title, detail=detail, remedy=remedy)
    if free < max(LITTLE_ROOM, used):
        return Finding(level="warning", title=title, detail=detail, remedy=remedy)
    return Finding(level="ok", title=title, detail=detail)


def log(size: int) -> Finding:
    """``size``: bytes of the write-ahead log."""
    title, detail = "write-ahead log", _size(size)
    if size <= LARGE_LOG:
        return Finding(level="ok", title=title, detail=detail)
    return Finding(
        level="warning",
        title=title,
        detail=f"{detail}: something kept a transaction open, so that the log could not be copied into the file",
        remedy="find the process that leaves a transaction open on the file (a shell, a backup, a stopped process); "
        'then sqlite3 FILE "PRAGMA wal_checkpoint(TRUNCATE)"',
    )


def _look_at(path: Path, version: int) -> Iterator[Finding]:
    folder = path.parent
    if not folder.is_dir():
        remedy = f"mkdir -p {folder}, or change the URL"
        yield Finding(level="error", title="folder", detail=f"{folder} does not exist", remedy=remedy)
        return
    if sys.platform == "linux":
        yield mounts.judge(mounts.of(folder, mounts.MOUNTS.read_text()))
    used = path.stat().st_size if path.exists() else 0
    yield room(shutil.disk_usage(folder).free, used)
    yield _permissions(path)
    bell = Path(f"{path}.bell")
    if SUPPORTED and bell.exists() and _usable(bell):
        yield locks(bell)
    if path.exists():
        written_ahead = Path(f"{path}-wal")
        yield log(written_ahead.stat().st_size if written_ahead.exists() else 0)
        yield from _content(path, version)


def _permissions(path: Path) -> Finding:
    """Files that a process of another user has made are the usual reason why workers cannot start."""
    title, folder = "permissions", path.parent
    owner = path.stat().st_uid if path.exists() else None
    files = [file for end in _FILES if (file := Path(f"{path}{end}")).exists()]
    for file in (folder, *files):
        if not _usable(file):
            remedy = f"run as the owner of the file, or give this user the right: chown or chmod {file}"
            detail = f"{file} cannot be read and written to by this user"
            return Finding(level="error", title=title, detail=detail, remedy=remedy)
    for file in files:
        if file.stat().st_uid != owner:
            detail = f"{file} belongs to user {file.stat().st_uid}, {path} to user {owner}: one may lock the other out"
            return Finding(level="warning", title=title, detail=detail, remedy=f"chown {owner} {file}")
    for file in (folder, *files):
        mode = file.stat().st_mode
        if os.name == "posix" and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            detail = f"every user of this machine can change or replace {file}"
            return Finding(level="warning", title=title, detail=detail, remedy=f"chmod o-w {file}")
    return Finding(level="ok", title=title, detail=f"{path} and its folder can be written to")


def _usable(file: Path) -> bool:
    needed = os.R_OK | os.W_OK | (os.X_OK if file.is_dir() else 0)
    return os.access(file, needed, effective_ids=os.access in os.supports_effective_ids)


def locks(file: Path) -> Finding:
    """Another process must be refused the lock that this one holds: without that, two write at once."""
    import fcntl

    title = "file locks"
    with file.open("r+b") as held:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding(level="ok", title=title, detail="work: another process holds the one that was tried")
        except OSError as error:
            detail = f"the file system of {file.parent} has none ({error.strerror})"
            return Finding(level="error", title=title, detail=detail, remedy=mounts.MOVE)
        answer = _try_in_another_process(file)
    if answer == 0:
        detail = f"two processes got the same lock in {file.parent}: both would write at once"
        return Finding(level="error", title=title, detail=detail, remedy=mounts.MOVE)
    if answer == _REFUSED:
        return Finding(level="ok", title=title, detail="a second process is refused")
    return Finding(
        level="warning",
        title=title,
        detail=f"could not be tried: {sys.executable}: {answer}",
        remedy="run postroom doctor from the command line",
    )


def _try_in_another_process(file: Path) -> int | str:
    """Its exit code, or why there is none."""
    try:
        return subprocess.run([sys.executable, "-I", "-S", "-c", _TRY_LOCK, str(file)], check=False).returncode
    except OSError as error:
        return str(error)


def _content(path: Path, version: int) -> Iterator[Finding]:
    """As a connection of its own sees it, which neither creates nor changes anything."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_DEADLINE)) as connection:
            yield _journal(str(connection.execute("PRAGMA journal_mode").fetchone()[0]))
            yield _schema(int(connection.execute("PRAGMA user_version").fetchone()[0]), version)
            yield _integrity(connection, path)
    except sqlite3.Error as error:
        remedy = "see the connection above"
        yield Finding(level="error", title="content", detail=str(translate(error, path)), remedy=remedy)


def _journal(mode: str) -> Finding:
    if mode == "wal":
        return Finding(level="ok", title="journal mode", detail="wal")
    return Finding(
        level="error",
        title="journal mode",
        detail=f"{mode} instead of wal: readers and writers shut each other out, and no worker is woken",
        remedy="remove whatever sets PRAGMA journal_mode, then restart the workers: connecting sets it",
    )


def _schema(found: int, version: int) -> Finding:
    if found == version:
        return Finding(level="ok", title="schema", detail=f"version {found}")
    remedy = "upgrade Postroom in this environment" if found > version else "restart: connecting migrates the file"
    detail = f"version {found}, but this Postroom writes version {version}"
    return Finding(level="error", title="schema", detail=detail, remedy=remedy)


def _integrity(connection: sqlite3.Connection, path: Path) -> Finding:
    title = "integrity"
    deadline = time.monotonic() + CHECK_TIME
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    try:
        found = [str(line) for (line,) in connection.execute("PRAGMA quick_check(3)")]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return Finding(
            level="warning",
            title=title,
            detail=f"the file is too large to be checked in {CHECK_TIME:.0f} s; no damage was found so far",
            remedy=f'at a quiet hour: sqlite3 {path} "PRAGMA quick_check"',
        )
    if found == ["ok"]:
        return Finding(level="ok", title=title, detail="no damage found (quick_check)")
    return Finding(
        level="error",
        title=title,
        detail="; ".join(" ".join(line.split()) for line in found),
        remedy=f"stop everything, then restore a copy, or save the rest: sqlite3 {path} .recover | sqlite3 new.db",
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} TiB"
