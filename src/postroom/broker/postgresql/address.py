"""From a URL to what the client is given, the broker's own options, and what may be shown of it."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlunsplit

from postroom.broker.address import split
from postroom.errors import ConfigurationError

SCHEMA = "postroom_broker"
"""The schema of the database in which the tables are, unless the URL names another."""

_OWN = ("schema", "migrate", "pgbouncer")
_CLIENT = (
    "host", "port", "user", "password", "dbname", "database", "passfile", "application_name", "options",
    "sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslnegotiation", "ssl",
    "ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs", "krbsrvname", "gsslib", "service",
    "servicefile",
)  # fmt: skip
"""What asyncpg knows in a URL; anything else it would take for a setting of the server."""
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_LOOPBACK = ("", "localhost", "127.0.0.1", "::1")
_FORM = "write postgresql://[user:password@]host[:port]/database"


class Place(NamedTuple):
    """A database, for comparison with another connection's."""

    hosts: frozenset[tuple[str, int]]
    database: str


class Address(NamedTuple):
    """One database and one schema in it."""

    url: str
    """For the client, without our options."""
    schema: str
    migrate: bool
    """Whether connecting may create and migrate the tables."""
    pgbouncer: bool
    """Whether a pooler may give each transaction to another server connection."""
    place: Place
    files: tuple[str, ...]
    """What the client is to read: certificates and keys."""
    shown: str
    """The URL without its password."""


def parse(url: str, default_schema: str = SCHEMA) -> Address:
    """Raises ``ConfigurationError``, which never shows the password."""
    parts = split(url)
    where = parts.netloc.rpartition("@")[2]
    shown = f"{parts.scheme}://{where}{parts.path}"
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"{shown}: {_FORM}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in _OWN and name not in _CLIENT:
            near = difflib.get_close_matches(name, (*_OWN, *_CLIENT), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join((*_OWN, *_CLIENT))}"
            raise ConfigurationError(f"{shown}: there is no option {name!r}; {hint}")
    schema = options.get("schema", default_schema)
    if not _NAME.fullmatch(schema) or schema.startswith("pg_"):
        raise ConfigurationError(f"{shown}: schema={schema!r}: use up to 63 of a-z, 0-9 and _, not beginning with pg_")
    rest = {name: value for name, value in options.items() if name not in _OWN}
    database = rest.get("dbname") or rest.get("database") or unquote(parts.path.removeprefix("/"))
    return Address(
        url=urlunsplit(parts._replace(query=urlencode(rest))),
        schema=schema,
        migrate=_choice("migrate", options.get("migrate", "never"), ("never", "auto"), shown) == "auto",
        pgbouncer=_choice("pgbouncer", options.get("pgbouncer", "0"), ("0", "1"), shown) == "1",
        place=Place(_hosts(rest.get("host", where), rest.get("port", ""), shown), database),
        files=tuple(rest[name] for name in _FILES if rest.get(name)),
        shown=shown,
    )


def same_host(name: str) -> str:
    """All names of this machine, and sockets on it, are one."""
    return "localhost" if name in _LOOPBACK or name.startswith("/") else name.lower()


def _hosts(text: str, ports: str, shown: str) -> frozenset[tuple[str, int]]:
    found = set()
    for item in unquote(text).split(","):
        host, port = item, ports
        if item.startswith("["):
            host, _, port = item[1:].partition("]")
            port = port.removeprefix(":") or ports
        elif item.count(":") == 1:
            host, _, port = item.partition(":")
        if port and not port.isdecimal():
            raise ConfigurationError(f"{shown}: the port must be a number, not {port!r}")
        found.add((same_host(host), int(port or 5432)))
    return frozenset(found)


def _choice(name: str, text: str, allowed: tuple[str, ...], shown: str) -> str:
    if text not in allowed:
        raise ConfigurationError(f"{shown}: {name}={text!r}: write {' or '.join(f'{name}={one}' for one in allowed)}")
    return text
