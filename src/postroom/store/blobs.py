"""Files that belong to messages: the claim check.

A file is written, and synced, before its message is published, and removed after the message has ended;
so a message never points at nothing. What a crash leaves behind between the two is found by its age.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from postroom.errors import BrokerUnavailable, DecodeError, ValidationError

SCHEME = "upload:"
_CHUNK = 1 << 20


class BlobStore:
    """A directory with one folder a message: ``<message id>/<parameter>/<file name>``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def writer(self, message_id: str, parameter: str, filename: str) -> Iterator[tuple[str, BinaryIO]]:
        """Yields the reference for the message's body and a file to write to; durable on leaving.

        Raises ``BrokerUnavailable`` if the disk refuses, ``ValidationError`` for an unusable file name.
        """
        name = safe_name(filename)
        folder = self.directory / message_id / parameter
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as file:
                yield f"{SCHEME}{parameter}/{name}", file
                file.flush()
                os.fsync(file.fileno())
            for parent in (folder, folder.parent, self.directory):
                _sync_directory(parent)
        except OSError as error:
            self.remove(message_id)
            raise BrokerUnavailable(f"cannot keep the file {name!r} in {self.directory}: {error.strerror}") from error
        except BaseException:
            self.remove(message_id)
            raise

    def copy(self, message_id: str, parameter: str, source: Path) -> str:
        """Keep a copy of the caller's file. Returns the reference. Raises ``ValidationError`` if it cannot be read."""
        try:
            file = open(source, "rb")  # noqa: SIM115 -- opened here so that only its own failure is the caller's
        except OSError as error:
            raise ValidationError(f"{parameter}: cannot read {source}: {error.strerror}", field=parameter) from error
        with file, self.writer(message_id, parameter, source.name) as (reference, target):
            shutil.copyfileobj(file, target, _CHUNK)
        return reference

    def resolve(self, message_id: str, reference: str) -> Path:
        """The path of a message's own file. Raises ``DecodeError`` if it is not there, or not the message's."""
        parameter, _, name = reference.removeprefix(SCHEME).partition("/")
        path = self.directory / message_id / parameter / name
        if not reference.startswith(SCHEME) or name != _basename(name) or parameter != _basename(parameter):
            raise DecodeError(f"{reference!r} is not a reference to an uploaded file")
        if not path.is_file():
            raise DecodeError(f"the uploaded file {path} is missing")
        return path

    def remove(self, message_id: str) -> None:
        """Delete all files of a message; nothing happens if there are none. Raises ``OSError``."""
        folder = _basename(message_id)
        # An id made up by a stranger must never name the directory itself, or one outside it.
        if folder and folder == message_id and (self.directory / folder).is_dir():
            shutil.rmtree(self.directory / folder)

    def older_than(self, age: float) -> list[str]:
        """Ids of messages whose files were written more than ``age`` seconds ago."""
        if not self.directory.is_dir():
            return []
        before = time.time() - age
        return [entry.name for entry in os.scandir(self.directory) if entry.is_dir() and entry.stat().st_mtime < before]


def safe_name(filename: str) -> str:
    """The last part of a file name from outside, safe to create. Raises ``ValidationError``."""
    name = _basename(filename.replace("\\", "/"))
    if not name or len(name.encode()) > 200 or not name.isprintable():
        raise ValidationError(f"file name {filename!r}: give a plain name of at most 200 bytes", field="filename")
    return name


def _basename(name: str) -> str:
    base = name.rpartition("/")[2]
    return "" if base in (".", "..") else base


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a directory; its file systems journal the entry themselves.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def directory_for(uploads: str | os.PathLike[str] | None, url: str) -> Path:
    """Where the files of an app's jobs are kept: ``uploads``, or else beside the file of the broker at ``url``."""
    if uploads is not None:
        return Path(uploads)
    if url.startswith("sqlite:///"):
        return Path(url.removeprefix("sqlite:///").partition("?")[0] + ".uploads")
    return Path("postroom.uploads")
