"""What of a server or a database can break a promise: syncing, rights, old transactions, connections. Only looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from postroom.broker.postgresql.link import CONNECTIONS, Link
from postroom.doctor import Finding

OLD_TRANSACTION = 300.0
"""Seconds for which a transaction may be open before it is told of: nothing that has ended since can be removed."""
MANY_DEAD = 100_000
"""Dead rows of one table that vacuum should not have left behind."""
FEW_LEFT = 10

_SETTINGS = (
    "fsync", "full_page_writes", "synchronous_commit", "autovacuum", "track_counts", "max_connections",
    "superuser_reserved_connections", "idle_in_transaction_session_timeout", "default_transaction_read_only",
)  # fmt: skip
_SERVER = """
SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS standby,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
    (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS tls, inet_server_addr() AS address
"""
_OLDEST = """
SELECT pid, coalesce(usename, '?') AS name, coalesce(nullif(application_name, ''), '?') AS program, state,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age
FROM pg_stat_activity WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() AND datname = current_database()
    AND backend_type = 'client backend'
ORDER BY xact_start LIMIT 1
"""
_DEAD = """
SELECT relname AS name, n_dead_tup AS dead, n_live_tup AS live, last_autovacuum FROM pg_stat_user_tables
WHERE schemaname = $1 ORDER BY n_dead_tup DESC LIMIT 1
"""
_RIGHTS = """
SELECT c.relname AS name FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed
WHERE c.relnamespace = to_regnamespace($1) AND c.relkind = 'r' AND c.relname <> 'version'
    AND NOT has_table_privilege(c.oid, needed)
GROUP BY c.relname ORDER BY c.relname
"""

Told = Mapping[str, Any]


async def examine(link: Link, version: int) -> list[Finding]:
    """``version``: of our tables. What the settings mean: https://www.postgresql.org/docs/current/runtime-config-wal.html"""
    settings = dict(
        await link.fetch("SELECT name, setting FROM pg_settings WHERE name = ANY ($1::text[])", list(_SETTINGS))
    )
    (server,) = await link.fetch(_SERVER)
    oldest = await link.fetch(_OLDEST)
    dead = await link.fetch(_DEAD, link.address.schema)
    missing = [row[0] for row in await link.fetch(_RIGHTS, link.address.schema)]
    return [
        Finding(level="ok", title="version", detail=f"PostgreSQL {server['version']}; schema version {version}"),
        _role(server, settings),
        *syncing(settings),
        _vacuum(settings),
        transactions(oldest[0] if oldest else None),
        *([rows(dead[0])] if dead else []),
        connections(int(server["connections"]), settings),
        rights(missing),
        encryption(server),
    ]


def _role(server: Told, settings: Told) -> Finding:
    if not server["standby"] and settings["default_transaction_read_only"] == "off":
        return Finding(level="ok", title="role", detail="takes writes")
    why = "is a standby" if server["standby"] else "has default_transaction_read_only = on"
    remedy = "name the primary in the URL, or all hosts with target_session_attrs=primary"
    return Finding(level="error", title="role", detail=f"the server {why}: nothing can be enqueued", remedy=remedy)


def syncing(settings: Told) -> list[Finding]:
    """``settings``: as ``pg_settings`` tells them."""
    found = []
    for name, consequence in (
        ("fsync", "a power cut can lose confirmed messages, and damage every table"),
        ("full_page_writes", "a power cut can damage pages that were half written"),
    ):
        if settings[name] == "on":
            found.append(Finding(level="ok", title=name, detail="on"))
        else:
            remedy = f"ALTER SYSTEM SET {name} = on; then SELECT pg_reload_conf()"
            found.append(Finding(level="error", title=name, detail=f"off: {consequence}", remedy=remedy))
    value, title = settings["synchronous_commit"], "synchronous_commit"
    if value == "off":
        detail = "off: Postroom turns it on for its own transactions, but what you commit beside may be lost in a crash"
        remedy = "ALTER SYSTEM SET synchronous_commit = on; or leave it off where you know why"
        return [*found, Finding(level="warning", title=title, detail=detail, remedy=remedy)]
    return [*found, Finding(level="ok", title=title, detail=value)]


def _vacuum(settings: Told) -> Finding:
    if settings["autovacuum"] == settings["track_counts"] == "on":
        return Finding(level="ok", title="autovacuum", detail="on")
    off = "autovacuum" if settings["autovacuum"] != "on" else "track_counts"
    remedy = f"ALTER SYSTEM SET {off} = on; then SELECT pg_reload_conf()"
    detail = f"{off} = off: dead rows stay, and every claim becomes slower than the one before"
    return Finding(level="error", title="autovacuum", detail=detail, remedy=remedy)


def transactions(oldest: Told | None) -> Finding:
    """``oldest``: the client that has had a transaction open for longest."""
    title = "open transactions"
    if oldest is None or oldest["age"] < OLD_TRANSACTION:
        detail = "none" if oldest is None else f"the oldest has lasted {oldest['age']:.0f} s"
        return Finding(level="ok", title=title, detail=detail)
    return Finding(
        level="warning",
        title=title,
        detail=f"{oldest['name']} ({oldest['program']}, process {oldest['pid']}, {oldest['state']}) has had one open "
        f"for {oldest['age']:,.0f} s: since then no dead row can be removed, and claims become slower",
        remedy=f"find out what it does, or SELECT pg_terminate_backend({oldest['pid']}); "
        "idle_in_transaction_session_timeout ends such sessions by itself",
    )


def rows(table: Told) -> Finding:
    """``table``: the one with the most dead rows."""
    title = "dead rows"
    detail = f"{table['dead']:,} dead and {table['live']:,} live in {table['name']}"
    if table["dead"] < max(MANY_DEAD, table["live"]):
        return Finding(level="ok", title=title, detail=detail)
    remedy = "see open transactions, prepared transactions and replication slots; then VACUUM the table"
    return Finding(level="warning", title=title, detail=f"{detail}: vacuum does not keep up", remedy=remedy)


def connections(used: int, settings: Told) -> Finding:
    """``used``: those of all clients."""
    most = int(settings["max_connections"]) - int(settings["superuser_reserved_connections"])
    title, detail = "connections", f"{used} of {most} in use; each process of Postroom takes up to {CONNECTIONS + 1}"
    if most - used >= FEW_LEFT:
        return Finding(level="ok", title=title, detail=detail)
    remedy = "raise max_connections, or put PgBouncer before the server and ?pgbouncer=1 into the URL"
    return Finding(level="warning", title=title, detail=detail, remedy=remedy)


def rights(missing: Sequence[str]) -> Finding:
    """``missing``: tables in which this user may not do everything."""
    if not missing:
        return Finding(level="ok", title="permissions", detail="this user may read and write every table")
    return Finding(
        level="error",
        title="permissions",
        detail=f"this user may not read and write {', '.join(missing)}",
        remedy="GRANT USAGE ON SCHEMA …, then GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA … and "
        "USAGE ON ALL SEQUENCES IN SCHEMA … to it",
    )


def encryption(server: Told) -> Finding:
    """``server``: whether this connection has TLS, and the address it leads to."""
    title, address = "encryption", server["address"]
    if server["tls"]:
        return Finding(level="ok", title=title, detail="TLS")
    if address is None or address.is_loopback:
        return Finding(level="ok", title=title, detail="none, within this machine")
    remedy = "put sslmode=verify-full and sslrootcert=… into the URL"
    detail = f"none: everybody between here and {address} can read messages and passwords"
    return Finding(level="warning", title=title, detail=detail, remedy=remedy)
