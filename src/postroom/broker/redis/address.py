"""From a URL to a server, a namespace, and what may be shown of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

import msgspec

from postroom.broker.address import split
from postroom.errors import ConfigurationError

_OPTIONS = ("namespace", "cluster", "cafile", "certfile", "keyfile")
_FILES = {"cafile": "ssl_ca_certs", "certfile": "ssl_certfile", "keyfile": "ssl_keyfile"}
FILES = frozenset(_FILES.values())
"""Arguments of the client that name files."""
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Address(msgspec.Struct, frozen=True):
    """Where the server is, and under which names everything is kept there."""

    host: str
    port: int
    database: int
    username: str | None
    password: str | None
    tls: Mapping[str, Any]
    """Arguments of the client for TLS; empty without it."""
    namespace: str
    cluster: bool
    shown: str
    """The URL without its password."""

    @property
    def root(self) -> str:
        """What all keys begin with: its hash tag keeps them in one slot of a cluster."""
        return f"{{{self.namespace}}}:"


def parse(url: str) -> Address:
    """Raises ``ConfigurationError``, which never shows the password."""
    parts = split(url)
    try:
        port = parts.port or 6379
    except ValueError:
        # What is wrong may be a password that is not escaped: the error would show it.
        raise ConfigurationError(
            "redis URL: write redis://[user:password@]host[:port][/database], the port a number up to 65535, and in "
            "user and password %2F for '/', %23 for '#', %3F for '?' and %40 for '@'"
        ) from None
    given = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(given)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    shown = f"{parts.scheme}://{host}:{port}{parts.path}"
    if parts.fragment or len(options) < len(given):
        raise ConfigurationError(f"{shown}: no '#…' at the end, and each option once")
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ConfigurationError(f"{shown}: write redis://[user:password@]host[:port][/database], or rediss:// for TLS")
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_OPTIONS)}"
            raise ConfigurationError(f"{shown}: there is no option {name!r}; {hint}")
    return Address(
        host=parts.hostname,
        port=port,
        database=_database(parts.path, shown),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=_tls(parts.scheme == "rediss", options, shown),
        namespace=_namespace(options.get("namespace", "postroom"), shown),
        cluster=_flag("cluster", options.get("cluster", "no"), shown),
        shown=shown,
    )


def _database(path: str, shown: str) -> int:
    text = path.removeprefix("/") or "0"
    if not (text.isascii() and text.isdecimal()):
        raise ConfigurationError(f"{shown}: the database must be a number, as in redis://host/0, not {text!r}")
    return int(text)


def _namespace(text: str, shown: str) -> str:
    if not _NAMESPACE.fullmatch(text):
        raise ConfigurationError(f"{shown}: namespace={text!r}: use 1 to 64 letters, digits, '.', '_' and '-'")
    return text


def _flag(name: str, text: str, shown: str) -> bool:
    if text not in ("yes", "no"):
        raise ConfigurationError(f"{shown}: {name}={text!r}: write {name}=yes or {name}=no")
    return text == "yes"


def _tls(wanted: bool, options: Mapping[str, str], shown: str) -> Mapping[str, Any]:
    given = {name: options[name] for name in _FILES if name in options}
    if given and not wanted:
        raise ConfigurationError(f"{shown}: {', '.join(given)}: only with rediss://, which uses TLS")
    if not wanted:
        return {}
    return {"ssl": True} | {_FILES[name]: value for name, value in given.items()}
