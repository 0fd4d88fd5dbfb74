"""The servers there are, by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from services.base import Server

NAMES = {
    "kafka": "kafka.KafkaServer",
    "mariadb": "mariadb.MariaDBServer",
    "postgresql": "postgresql.PostgreSQLServer",
    "postgresql18": "postgresql.PostgreSQL18Server",
    "rabbitmq": "rabbitmq.RabbitMQServer",
    "rabbitmq4": "rabbitmq.RabbitMQ4Server",
    "redis": "redis.RedisServer",
    "redis8": "redis.Redis8Server",
    "sqs": "sqs.SQSServer",
    "valkey": "redis.ValkeyServer",
}
"""Module of this package, and its class."""

BY_HAND = ("postgresql18", "redis8")
"""Those that no test names: ``POSTROOM_TEST_REDIS=redis8 pytest …`` runs any on them."""


def make_server(name: str, folder: Path) -> Server:
    """A server that is not started. Raises ``KeyError`` for an unknown name."""
    module, _, kind = NAMES[name].partition(".")
    server: Server = getattr(import_module(f"services.{module}"), kind)(folder)
    return server
