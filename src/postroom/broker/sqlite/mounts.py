"""On what a folder lies: not every file system keeps what SQLite's write-ahead log needs."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from postroom.doctor import Finding

MOUNTS = Path("/proc/self/mountinfo")
"""Linux: what is mounted where, https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html."""
MOVE = "move the file, with its workers and producers stopped, to a local disk of the machine they run on"

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs",
    "fuse.sshfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs", "vboxsf", "virtiofs",
}  # fmt: skip
_MEMORY = {"ramfs", "tmpfs"}
_UNSAFE = {"nobarrier", "barrier=0"}
_ESCAPED = re.compile(r"\\(\d{3})")


class Mount(msgspec.Struct, frozen=True):
    """One line of ``mountinfo``."""

    point: str
    kind: str
    options: frozenset[str]


def of(folder: Path, mountinfo: str) -> Mount:
    """The mount that ``folder`` (absolute, free of links) lies on. Raises ``ValueError`` if there is none."""
    found = [mount for line in mountinfo.splitlines() if folder.is_relative_to((mount := _parsed(line)).point)]
    # Of two at the same point the later hides the earlier.
    return max(enumerate(found), key=lambda item: (len(item[1].point), item[0]))[1]


def judge(mount: Mount) -> Finding:
    """Whether a broker's file may lie there."""
    title, where = "file system", f"{mount.kind} at {mount.point}"
    if mount.kind in _NETWORK:
        detail = f"{where} is a network file system: SQLite's write-ahead log needs memory shared among its processes"
        return Finding(level="error", title=title, detail=detail, remedy=MOVE)
    if mount.kind in _MEMORY:
        detail = f"{where} is memory: every message is lost when the machine restarts"
        return Finding(level="error", title=title, detail=detail, remedy=MOVE)
    if unsafe := mount.options & _UNSAFE:
        detail = f"{where} is mounted with {min(unsafe)}: a power cut loses messages that were confirmed"
        return Finding(level="error", title=title, detail=detail, remedy=f"mount {mount.point} without it")
    if mount.kind == "overlay":
        detail = f"{where} is the inside of a container: the messages go with it"
        return Finding(level="warning", title=title, detail=detail, remedy="put the file on a volume")
    if mount.kind.startswith("fuse"):
        detail = f"{where}: whether it keeps locks and syncs depends on the program behind it"
        return Finding(level="warning", title=title, detail=detail, remedy=MOVE)
    return Finding(level="ok", title=title, detail=where)


def _parsed(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    fields, (kind, _, *rest) = left.split(" "), right.split(" ")
    point = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), fields[4])
    return Mount(point, kind, frozenset(",".join((fields[5], *rest)).split(",")))
