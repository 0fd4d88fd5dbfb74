"""What of a server can break a promise: version, persistence, memory, replicas, clock. Only looks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from postroom.broker.redis.link import Link
from postroom.doctor import Finding, Level

_CONFIG = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "min-replicas-to-write")
_SKEW = 1.0
"""Seconds by which the clocks of server and client may differ before anybody notices it in delays."""
_NEARLY_FULL = 0.8

Told = Mapping[str, Any]


async def examine(link: Link) -> list[Finding]:
    """https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/ says what the settings mean."""
    with link.using() as client:
        # A server clock, or a client's, that is read late looks wrong: what is between the two readings is allowed for.
        before = time.time()
        seconds, microseconds = await client.time()
        after = time.time()
        try:
            info: Told = _one(await client.info("everything"))
        except (NoPermissionError, ResponseError):
            return [_hidden("server", "INFO")]
        try:
            config: Told = _one(await client.config_get(*_CONFIG))
        except (NoPermissionError, ResponseError):
            config = {}
    findings = [
        version(info),
        place(info, cluster=link.address.cluster),
        writes(info),
        clock(before, seconds + microseconds / 1e6, after),
    ]
    findings += [replicas(info, config), room(info), *evicted(info)]
    # What others run for us may tell some settings only.
    told = config.keys() >= {"appendonly", "appendfsync", "maxmemory", "maxmemory-policy"}
    return findings + (list(settings(config)) if told else [_hidden("settings", "CONFIG GET")])


def version(info: Told) -> Finding:
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
    number = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if number >= (7, 0):
        return _finding("ok", "version", name)
    return _finding(
        "error", "version", f"{name} is too old: its scripts lack flags", "upgrade to Redis 7.0 or newer, or Valkey"
    )


def place(info: Told, *, cluster: bool) -> Finding:
    """``cluster``: as the URL says."""
    enabled = bool(info.get("cluster_enabled"))
    if info.get("role") in ("slave", "replica"):
        return _finding("error", "role", "a replica: it refuses all writes", "use the URL of its master")
    if enabled == cluster:
        return _finding("ok", "role", "master, in a cluster" if enabled else "master")
    if enabled:
        remedy = "add cluster=yes to the URL"
        return _finding(
            "warning", "role", "one node of a cluster: after a failover or resharding it refuses us", remedy
        )
    return _finding(
        "error", "role", "cluster=yes, but the server is not in a cluster", "remove cluster=yes from the URL"
    )


def writes(info: Told) -> Finding:
    for what in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status"):
        if info.get(what, "ok") != "ok":
            remedy = (
                "look for a full disk or missing permissions in the server's log; with MISCONF it refuses publishes"
            )
            return _finding(
                "error", "last writes", f"{what} = {info[what]}: the disk does not take what it should", remedy
            )
    return _finding("ok", "last writes", "the disk took them")


def clock(before: float, server: float, after: float) -> Finding:
    """The server's time, and ours before and after it was asked for."""
    ahead = max(0.0, server - after) - max(0.0, before - server)
    if abs(ahead) <= _SKEW:
        return _finding("ok", "clock", "server and this machine agree")
    which = "ahead of" if ahead > 0 else "behind"
    detail = f"the server is {abs(ahead):.1f} s {which} this machine: delayed messages come by its clock"
    return _finding("warning", "clock", detail, "let both follow a time server (chrony, systemd-timesyncd)")


def replicas(info: Told, config: Told) -> Finding:
    count = int(info.get("connected_slaves", 0))
    if not count:
        return _finding("ok", "replicas", "none: the server is the only place of its messages")
    least = int(config.get("min-replicas-to-write", 0))
    detail = f"{count}, which are behind by what was confirmed last: a failover can lose it"
    if least == 0:
        detail += "; and a master that is cut off goes on confirming"
    remedy = "CONFIG SET min-replicas-to-write 1 bounds it; a failover by hand (FAILOVER) loses nothing"
    return _finding("warning", "replicas", detail, remedy)


def room(info: Told) -> Finding:
    used, most = int(info["used_memory"]), int(info.get("maxmemory", 0))
    if not most:
        total = int(info.get("total_system_memory", 0))
        detail = f"{_size(used)} of {_size(total)} of the machine; no maxmemory: the kernel may kill the server"
        return _finding(
            "warning", "memory", detail, "CONFIG SET maxmemory to what it may take: then producers are refused first"
        )
    detail = f"{_size(used)} of {_size(most)}"
    if used > most * _NEARLY_FULL:
        remedy = "raise maxmemory, set limits on queues, shorten result_ttl: at the end producers are refused"
        return _finding("warning", "memory", detail, remedy)
    return _finding("ok", "memory", detail)


def evicted(info: Told) -> Iterator[Finding]:
    count = int(info.get("evicted_keys", 0))
    if count:
        detail = f"{count:,} since the server began: messages, dead letters and idempotency keys may be among them"
        remedy = "CONFIG SET maxmemory-policy noeviction, and CONFIG RESETSTAT once you have looked at what is missing"
        yield _finding("error", "deleted to make room", detail, remedy)


def settings(config: Told) -> Iterator[Finding]:
    if config["appendonly"] != "yes":
        detail = "appendonly = no: after a crash what was confirmed since the last snapshot is gone"
        yield _finding("error", "persistence", detail, "CONFIG SET appendonly yes, and the same in redis.conf")
    elif config["appendfsync"] == "always":
        yield _finding("ok", "persistence", "append-only file, synced before each answer: it survives a power cut")
    else:
        if config["appendfsync"] == "everysec":
            # While a sync is under way the server puts off even the write, for up to two seconds, and answers.
            lost = "a power cut loses about a second; the death of the server up to two, if its disk is slow just then"
        else:
            lost = "it survives the death of the server; a power cut loses half a minute or more"
        detail = f"appendfsync = {config['appendfsync']}: {lost}"
        yield _finding(
            "warning", "persistence", detail, "CONFIG SET appendfsync always, where no confirmed message may be lost"
        )
    policy, limited = config["maxmemory-policy"], int(config["maxmemory"]) > 0
    if policy == "noeviction":
        yield _finding("ok", "eviction", "none (noeviction): a full server refuses")
    else:
        detail = f"maxmemory-policy = {policy}: a full server deletes keys" + (
            "" if limited else ", once it has a maxmemory"
        )
        detail += "; our idempotency keys, and with allkeys-… any message"
        yield _finding("error" if limited else "warning", "eviction", detail, "CONFIG SET maxmemory-policy noeviction")


def _one(told: Any) -> Told:
    """A cluster's client may answer by node."""
    if told and all(isinstance(value, dict) for value in told.values()) and "redis_version" not in told:
        answer: Told = next(iter(told.values()))
        return answer
    return {_text(name): _text(value) for name, value in told.items()}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _hidden(title: str, command: str) -> Finding:
    detail = f"this user may not run {command}: nothing can be said"
    return _finding(
        "warning",
        title,
        detail,
        f"ACL SETUSER … +{command.lower().replace(' ', '|')}, or run the doctor as another user",
    )


def _finding(level: Level, title: str, detail: str, remedy: str = "") -> Finding:
    return Finding(level=level, title=title, detail=detail, remedy=remedy)


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
