"""The doctor finds what was planted, and nothing where all is well."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from postroom import App, BrokerUnavailable
from postroom.broker.base import Broker, Subscription, Topic
from postroom.broker.memory import MemoryBroker
from postroom.broker.sqlite import SQLiteBroker, mounts, schema
from postroom.broker.sqlite import doctor as sqlite_doctor
from postroom.cli.diagnosis import diagnose, public
from postroom.doctor import Finding, Level
from postroom.message import Message, new_id

ROOT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a queue and some messages."""
    made = tmp_path / "x.db"
    fill(made)
    return made


def fill(path: Path, count: int = 500) -> None:
    async def main() -> None:
        broker = SQLiteBroker(f"sqlite:///{path}")
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await broker.publish(
            [Message(id=new_id(), topic="q", name="t", body=b"x" * 500, created_at=1.0) for _ in range(count)]
        )
        await broker.close()

    asyncio.run(main())


def examined(path: Path) -> dict[str, Finding]:
    """What the doctor finds, by title."""
    findings = asyncio.run(diagnose(App(f"sqlite:///{path}"), timeout=30.0))
    assert len({finding.title for finding in findings}) == len(findings), "each thing is told once"
    for finding in findings:
        assert finding.detail
        assert bool(finding.remedy) == (finding.level != "ok"), "whatever is wrong has a remedy"
    return {finding.title: finding for finding in findings}


def test_all_is_well(path: Path) -> None:
    found = examined(path)
    assert set(found) >= {
        "connection", "durability", "syncing", "free disk space", "permissions", "write-ahead log", "journal mode",
        "schema", "integrity", "SQLite library", "dead letters",
    }  # fmt: skip
    # What the machine that runs this is like is not for this test to judge.
    of_the_machine = {"SQLite library", "free disk space", "file system"}
    assert {title for title, finding in found.items() if finding.level != "ok"} <= of_the_machine


def test_looking_changes_nothing(path: Path) -> None:
    def content() -> list[str]:
        with closing(sqlite3.connect(path)) as connection:
            return list(connection.iterdump())

    before = content()
    examined(path)
    assert content() == before


def test_damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : -4096] = b"\xff" * (len(content) - len(content) // 2 - 4096)
    path.write_bytes(content)
    found = examined(path)["integrity"]
    assert found.level == "error"
    assert ".recover" in found.remedy


def test_a_file_of_a_newer_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    found = examined(path)
    assert found["connection"].level == "error"
    assert found["schema"].level == "error"
    assert "upgrade" in found["schema"].remedy


def test_a_log_that_cannot_be_copied_back(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM message").fetchone()
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("PRAGMA synchronous = OFF")
            for _ in range(35):
                writer.execute("UPDATE message SET body = randomblob(4096)")
        found = examined(path)["write-ahead log"]
    assert found.level == "warning"
    assert "transaction open" in found.remedy


@pytest.mark.parametrize(("setting", "title"), [
    ("synchronous = OFF", "syncing"),
    ("synchronous = NORMAL", "syncing"),
    ("journal_mode = DELETE", "journal mode"),
])  # fmt: skip
def test_a_weaker_setting(path: Path, setting: str, title: str) -> None:
    async def main() -> list[Finding]:
        broker = SQLiteBroker(f"sqlite:///{path}")
        await broker.connect()
        broker.engine.connection.execute(f"PRAGMA {setting}")
        try:
            return await broker.examine()
        finally:
            await broker.close()

    assert [finding.title for finding in asyncio.run(main()) if finding.level == "error"] == [title]


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root may do everything, so it becomes nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the ordinary user owns."""
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["file", "folder", "bell"])
def test_what_cannot_be_written_to(place: Path, what: str) -> None:
    path = place / "x.db"
    with as_ordinary_user():
        fill(path)
        culprit = {"file": path, "folder": place, "bell": Path(f"{path}.bell")}[what]
        culprit.chmod(0o500 if what == "folder" else 0o400)
        found = examined(path)
    assert found["permissions"].level == "error"
    assert str(culprit) in found["permissions"].detail
    if what != "folder":
        assert found["connection"].level == "error"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user(path: Path) -> None:
    os.chown(f"{path}.bell", NOBODY, NOBODY)
    found = examined(path)["permissions"]
    assert found.level == "warning"
    assert found.remedy == f"chown 0 {path}.bell"


def test_a_file_that_everybody_may_change(path: Path) -> None:
    path.chmod(0o666)
    found = examined(path)["permissions"]
    assert (found.level, found.remedy) == ("warning", f"chmod o-w {path}")


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#undef fcntl
static int answer(const char *name, int fd, int command, void *argument) {
    if (command == F_SETLK || command == F_SETLKW) return ANSWER;
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(fd, command, argument);
}
#define SHIM(name) int name(int fd, int command, ...) { va_list list; va_start(list, command); \\
    void *argument = va_arg(list, void *); va_end(list); return answer(#name, fd, command, argument); }
SHIM(fcntl)
SHIM(fcntl64)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.parametrize(("answer", "text"), [
    ("0", "two processes got the same lock"),
    ("(errno = ENOLCK, -1)", "has none"),
])  # fmt: skip
def test_a_file_system_without_locks(path: Path, tmp_path: Path, answer: str, text: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "locks.c").write_text(NO_LOCKS)
    command = [compiler, "-shared", "-fPIC", f"-DANSWER={answer}", "-o", "locks.so", "locks.c", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = (
        "import pathlib, sys; from postroom.broker.sqlite.doctor import locks; "
        "finding = locks(pathlib.Path(sys.argv[1])); print(finding.level, finding.detail)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{path}.bell"],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "locks.so")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("error")
    assert text in done.stdout


MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:40 / /srv/shared rw,relatime - nfs4 server:/export rw,vers=4.2
24 22 0:41 / /srv/my\040share rw - cifs //server/share rw
25 22 0:42 / /run rw,nosuid - tmpfs tmpfs rw,size=1g
26 22 8:2 / /fast rw - ext4 /dev/sdb1 rw,barrier=0
27 22 0:43 / /data rw - fuse.sshfs me@host: rw
32 22 0:46 / /clear rw - fuse.gocryptfs crypt rw
28 22 0:44 / /box rw - overlay overlay rw,lowerdir=/a
29 28 8:3 / /box/volume rw - xfs /dev/sdc1 rw
30 22 0:45 / /over rw - nfs server:/old rw
31 30 8:4 / /over rw - ext4 /dev/sdd1 rw
""".strip()


@pytest.mark.parametrize(("folder", "level", "text"), [
    ("/var/lib/shop", "ok", "ext4 at /"),
    ("/srv/shared/shop", "error", "nfs4 at /srv/shared is a network file system"),
    ("/srv/my share", "error", "cifs at /srv/my share"),
    ("/srv/sharedonly", "ok", "ext4"),
    ("/run/shop", "error", "memory"),
    ("/fast", "error", "barrier=0"),
    ("/data", "error", "fuse.sshfs"),
    ("/clear", "warning", "program behind it"),
    ("/box/app", "warning", "inside of a container"),
    ("/box/volume/app", "ok", "xfs"),
    ("/over", "ok", "ext4"),
])  # fmt: skip
def test_the_kind_of_file_system(folder: str, level: Level, text: str) -> None:
    found = mounts.judge(mounts.of(Path(folder), MOUNTS))
    assert found.level == level
    assert text in found.detail


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_the_real_mounts_are_read(tmp_path: Path) -> None:
    table = mounts.MOUNTS.read_text()
    assert mounts.of(Path("/dev/shm"), table).kind == "tmpfs"
    assert mounts.of(Path("/proc/self").resolve(), table).kind == "proc"
    assert mounts.of(tmp_path, table).kind


@pytest.mark.parametrize(("free", "used", "level"), [
    (sqlite_doctor.LEAST_ROOM - 1, 0, "error"),
    (sqlite_doctor.LITTLE_ROOM - 1, 0, "warning"),
    (sqlite_doctor.LITTLE_ROOM * 2, sqlite_doctor.LITTLE_ROOM * 3, "warning"),
    (sqlite_doctor.LITTLE_ROOM, sqlite_doctor.LITTLE_ROOM, "ok"),
])  # fmt: skip
def test_little_room(free: int, used: int, level: Level) -> None:
    assert sqlite_doctor.room(free, used).level == level


@pytest.mark.parametrize(("version", "level"), [
    ((3, 40, 1), "warning"),
    ((3, 44, 5), "warning"),
    ((3, 44, 6), "ok"),
    ((3, 45, 0), "warning"),
    ((3, 50, 6), "warning"),
    ((3, 50, 7), "ok"),
    ((3, 51, 2), "warning"),
    ((3, 51, 3), "ok"),
    ((3, 52, 0), "ok"),
    ((4, 0, 0), "ok"),
])  # fmt: skip
def test_a_library_with_a_known_fault(version: tuple[int, int, int], level: Level) -> None:
    assert sqlite_doctor.library(version).level == level


class RemoteBroker(MemoryBroker):
    """Connects to a real address first."""

    port = 0
    host = "127.0.0.1"
    tls: ssl.SSLContext | None = None

    async def connect(self) -> None:
        try:
            _, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
        except OSError as error:
            raise BrokerUnavailable(f"cannot reach {self.host}:{self.port}: {error}") from error
        writer.close()
        await writer.wait_closed()
        await super().connect()


class RemoteApp(App):
    def __init__(self, **fields: object) -> None:
        super().__init__("memory://")
        self.fields = fields

    def make_broker(self) -> Broker:
        broker = RemoteBroker()
        for name, value in self.fields.items():
            setattr(broker, name, value)
        return broker


def unreachable(app: App, timeout: float = 5.0) -> Finding:
    (finding,) = asyncio.run(diagnose(app, timeout=timeout))
    assert (finding.level, finding.title) == ("error", "connection")
    return finding


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "start the server" in unreachable(RemoteApp(port=port)).remedy


def test_no_such_host() -> None:
    assert "host name" in unreachable(RemoteApp(host="nowhere.invalid", port=1)).remedy


def test_a_silent_server_and_one_without_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        tls = ssl.create_default_context()
        found = unreachable(RemoteApp(port=server.getsockname()[1], tls=tls), timeout=0.2)
        assert "no answer within 0.2 s" in found.detail
        assert "firewall" in found.remedy

    async def main() -> Finding:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 hello\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as plain:
            app = RemoteApp(port=plain.sockets[0].getsockname()[1], tls=tls)
            (finding,) = await diagnose(app, timeout=5.0)
            return finding

    assert "TLS" in asyncio.run(main()).remedy


def test_wrong_credentials() -> None:
    class Refused(Exception):
        pass

    class Refusing(MemoryBroker):
        async def connect(self) -> None:
            try:
                raise Refused("ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN")
            except Refused as error:
                raise BrokerUnavailable("the server refused the connection") from error

    class RefusedApp(App):
        def make_broker(self) -> Broker:
            return Refusing()

    assert "user, password" in unreachable(RefusedApp("memory://")).remedy


def test_an_examination_that_fails_is_told() -> None:
    class Failing(MemoryBroker):
        async def examine(self) -> list[Finding]:
            raise BrokerUnavailable("the server went away")

    class FailingApp(App):
        def make_broker(self) -> Broker:
            return Failing()

    found = asyncio.run(diagnose(FailingApp("memory://"), timeout=5.0))
    assert [item.title for item in found if item.level == "error"] == ["examination"]


def test_what_the_app_asks_for_and_strangers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    fill(tmp_path / "x.db")
    app = App(url)

    @app.task(queue="other")
    def work() -> None: ...

    found = {finding.title: finding for finding in asyncio.run(diagnose(app, timeout=5.0))}
    assert found["what the app asks for"].level == "ok"
    assert found["subscriptions"].level == "warning"
    assert found["subscriptions"].detail.endswith(": q")
    assert "other" not in {item.name for item in App(url).stats()}, "nothing was declared"


def test_a_broker_that_cannot_do_what_is_asked() -> None:
    class Plain(MemoryBroker):
        capabilities = msgspec.structs.replace(MemoryBroker.capabilities, ordering=False, jobs=False)

    class PlainApp(App):
        def make_broker(self) -> Broker:
            return Plain()

    app = PlainApp("memory://")

    @app.task(ordered=True)
    def work() -> None: ...

    found = {finding.title: finding.level for finding in asyncio.run(diagnose(app, timeout=5.0))}
    assert found["what the app asks for"] == "error"
    assert found["store"] == "warning"
    assert found["durability"] == "warning"


@pytest.mark.parametrize(("url", "shown"), [
    ("sqlite:///postroom.db", "sqlite:///postroom.db"),
    ("amqp://me:secret@rabbit:5672/shop?password=secret", "amqp://rabbit:5672/shop"),
    ("redis://:p@ss@cache/0", "redis://cache/0"),
])  # fmt: skip
def test_a_url_is_shown_without_secrets(url: str, shown: str) -> None:
    assert public(url) == shown
