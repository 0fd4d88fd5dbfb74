"""The servers there are, by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from services.base import Server

NAMES = {
    "kafka": "KafkaServer",
    "mariadb": "MariaDBServer",
    "postgresql": "PostgreSQLServer",
    "rabbitmq": "RabbitMQServer",
    "redis": "RedisServer",
    "sqs": "SQSServer",
}
"""Module of this package, and its class."""


def make_server(name: str, folder: Path) -> Server:
    """A server that is not started. Raises ``KeyError`` for an unknown name."""
    server: Server = getattr(import_module(f"services.{name}"), NAMES[name])(folder)
    return server
