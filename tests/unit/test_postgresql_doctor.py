"""What the doctor finds on a PostgreSQL server: each thing planted once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import psycopg
import pytest
from services.base import Server

from postroom.broker.postgresql import PostgreSQLBroker, doctor
from postroom.doctor import Finding
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("postgresql", tmp_path_factory.mktemp("postgresql")) as made:
        yield made


def examine(url: str) -> dict[str, Finding]:
    async def run() -> list[Finding]:
        broker = PostgreSQLBroker(url)
        await broker.connect()
        found = await broker.examine()
        await broker.close()
        return found

    return {finding.title: finding for finding in asyncio.run(run())}


def alter(server: Server, *statements: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        for statement in (*statements, "SELECT pg_reload_conf()"):
            connection.execute(statement.encode())


def test_a_healthy_server(server: Server) -> None:
    found = examine(f"{server.url}?migrate=auto")
    assert {finding.level for finding in found.values()} == {"ok"}, found
    assert set(found) == {
        "version", "role", "fsync", "full_page_writes", "synchronous_commit", "autovacuum", "open transactions",
        "dead rows", "connections", "permissions", "encryption",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value", "title", "level"),
    [
        ("fsync", "off", "fsync", "error"),
        ("full_page_writes", "off", "full_page_writes", "error"),
        ("synchronous_commit", "off", "synchronous_commit", "warning"),
        ("autovacuum", "off", "autovacuum", "error"),
        ("track_counts", "off", "autovacuum", "error"),
    ],
)
def test_settings(server: Server, setting: str, value: str, title: str, level: str) -> None:
    alter(server, f"ALTER SYSTEM SET {setting} = {value}")
    try:
        found = examine(f"{server.url}?migrate=auto")
    finally:
        alter(server, f"ALTER SYSTEM RESET {setting}")
    assert found[title].level == level
    assert setting in found[title].remedy


def test_a_user_that_may_not_do_everything(server: Server) -> None:
    examine(f"{server.url}?migrate=auto")
    alter(
        server,
        "CREATE ROLE poor LOGIN",
        "GRANT USAGE ON SCHEMA postroom_broker TO poor",
        "GRANT SELECT ON ALL TABLES IN SCHEMA postroom_broker TO poor",
        "GRANT INSERT, UPDATE, DELETE ON postroom_broker.record TO poor",
    )
    found = examine(server.url.replace("postgres@", "poor@"))["permissions"]
    assert found.level == "error"
    assert "message" in found.detail
    assert "record" not in found.detail


def test_a_transaction_left_open(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLD_TRANSACTION", 0.0)
    with psycopg.connect(server.url, application_name="forgotten") as connection:
        connection.execute("SELECT 1")
        found = examine(f"{server.url}?migrate=auto")["open transactions"]
    assert (found.level, "forgotten" in found.detail) == ("warning", True)
    assert "pg_terminate_backend" in found.remedy


def test_what_would_take_long_to_plant() -> None:
    few: dict[str, Any] = {"max_connections": "100", "superuser_reserved_connections": "3"}
    assert doctor.connections(50, few).level == "ok"
    assert doctor.connections(90, few).level == "warning"
    assert doctor.rows({"name": "message", "dead": 90_000, "live": 10}).level == "ok"
    assert doctor.rows({"name": "message", "dead": 900_000, "live": 10}).level == "warning"
    away = ip_address("10.0.0.1")
    assert doctor.encryption({"tls": False, "address": away}).level == "warning"
    assert doctor.encryption({"tls": True, "address": away}).level == "ok"
    assert doctor.encryption({"tls": False, "address": None}).level == "ok"
