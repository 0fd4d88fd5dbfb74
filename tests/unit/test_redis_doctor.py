"""What the doctor finds: on a real server that is set up wrongly, one thing at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from services.base import Server
from services.redis import RedisServer

from postroom.broker.redis import RedisBroker, doctor
from postroom.doctor import Finding
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[Redis]:
    with Redis.from_url(server.url, decode_responses=True) as made:
        good = {"appendfsync": "always", "maxmemory": "100mb", "maxmemory-policy": "noeviction", "appendonly": "yes"}
        for name, value in good.items():
            made.config_set(name, value)
        yield made


def findings(url: str) -> dict[str, Finding]:
    async def examine() -> list[Finding]:
        broker = RedisBroker(url)
        await broker.connect()
        try:
            return await broker.examine()
        finally:
            await broker.close()

    return {finding.title: finding for finding in asyncio.run(examine())}


def test_nothing_is_wrong(server: Server, client: Redis) -> None:
    found = findings(server.url)
    assert {finding.level for finding in found.values()} == {"ok"}, found
    assert found.keys() == {"version", "role", "last writes", "clock", "replicas", "memory", "persistence", "eviction"}


def test_a_server_that_has_made_room(server: Server, client: Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.set("victim", "x" * 3_000_000)
    client.config_set("maxmemory", str(client.info("memory")["used_memory"] - 1_000_000))
    try:
        client.set("other", "x")
        found = findings(server.url)["deleted to make room"]
        assert (found.level, "may be among them" in found.detail) == ("error", True)
    finally:
        client.config_set("maxmemory", "100mb")
        client.config_resetstat()
        client.flushall()


@pytest.mark.parametrize(
    ("settings", "title", "level", "words"),
    [
        ({"appendonly": "no"}, "persistence", "error", "appendonly = no"),
        ({"appendfsync": "everysec"}, "persistence", "warning", "power cut loses about a second"),
        ({"appendfsync": "no"}, "persistence", "warning", "half a minute"),
        ({"maxmemory-policy": "allkeys-lru"}, "eviction", "error", "deletes keys"),
        ({"maxmemory-policy": "volatile-ttl", "maxmemory": "0"}, "eviction", "warning", "once it has a maxmemory"),
        ({"maxmemory": "0"}, "memory", "warning", "no maxmemory"),
        ({"maxmemory": "600000"}, "memory", "warning", "of 1 MiB"),
    ],
)
def test_a_wrong_setting(
    server: Server, client: Redis, settings: dict[str, str], title: str, level: str, words: str
) -> None:
    for name, value in settings.items():
        client.config_set(name, value)
    found = findings(server.url)
    assert (found[title].level, bool(found[title].remedy)) == (level, True)
    assert words in found[title].detail
    assert {other for other, finding in found.items() if finding.level != "ok"} - {title} <= {"memory"}


def test_replicas_and_the_url_of_one(server: Server, client: Redis, tmp_path_factory: pytest.TempPathFactory) -> None:
    replica = RedisServer(tmp_path_factory.mktemp("replica"), options=("--replicaof", "127.0.0.1", str(server.port)))
    replica.start()
    try:
        asyncio.run(_until(lambda: client.info("replication")["connected_slaves"] == 1))
        found = findings(server.url)["replicas"]
        assert (found.level, "goes on confirming" in found.detail) == ("warning", True)
        client.config_set("min-replicas-to-write", "1")
        assert "goes on confirming" not in findings(server.url)["replicas"].detail
        assert findings(replica.url)["role"].level == "error"
    finally:
        client.config_set("min-replicas-to-write", "0")
        replica.stop()


async def _until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 -- another process is waited for
            await asyncio.sleep(0.05)


def test_what_may_not_be_looked_at(server: Server, client: Redis) -> None:
    client.acl_setuser("blind", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"], categories=["+@all"],
                       commands=["-config"])  # fmt: skip
    found = findings(server.url.replace("redis://", "redis://blind:secret@"))
    assert (found["settings"].level, "CONFIG GET" in found["settings"].detail) == ("warning", True)
    client.acl_setuser("blind", enabled=True, commands=["-info"])
    found = findings(server.url.replace("redis://", "redis://blind:secret@"))
    assert (found["server"].level, "INFO" in found["server"].detail) == ("warning", True)
    assert "secret" not in str(found)


def test_a_server_that_tells_some_settings_only(server: Server, client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of one that others run for us."""
    monkeypatch.setattr(doctor, "_CONFIG", ("maxmemory", "maxmemory-policy"))
    assert findings(server.url)["settings"].level == "warning"


def test_old_servers_other_clocks_and_failing_disks() -> None:
    assert doctor.version({"redis_version": "6.2.14"}).level == "error"
    assert doctor.version({"redis_version": "7.2.4", "valkey_version": "8.1.0"}).detail == "Valkey 8.1.0"
    assert doctor.clock(100.0, 107.0, 101.0).detail.startswith("the server is 6.0 s ahead")
    assert doctor.clock(100.0, 95.0, 101.0).detail.startswith("the server is 5.0 s behind")
    assert doctor.clock(100.0, 103.0, 105.0).level == "ok"
    assert doctor.writes({"aof_last_write_status": "err"}).level == "error"
    assert doctor.place({"role": "master", "cluster_enabled": 1}, cluster=False).level == "warning"
    assert doctor.place({"role": "master", "cluster_enabled": 0}, cluster=True).level == "error"
