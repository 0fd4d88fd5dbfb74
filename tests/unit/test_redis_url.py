"""Redis URLs, and what is said of wrong ones."""

from __future__ import annotations

import pytest

from postroom.broker.redis.address import parse
from postroom.errors import ConfigurationError


def test_all_parts() -> None:
    found = parse("rediss://ann:p%40ss@redis.example:6390/3?namespace=shop&cluster=yes&cafile=/ca.pem&keyfile=/key.pem")
    assert (found.host, found.port, found.database) == ("redis.example", 6390, 3)
    assert (found.username, found.password) == ("ann", "p@ss")
    assert found.tls == {"ssl": True, "ssl_ca_certs": "/ca.pem", "ssl_keyfile": "/key.pem"}
    assert (found.root, found.cluster) == ("{shop}:", True)
    assert found.shown == "rediss://redis.example:6390/3"


def test_an_address_in_numbers() -> None:
    found = parse("redis://[::1]:6390/1")
    assert (found.host, found.port, found.shown) == ("::1", 6390, "redis://[::1]:6390/1")


def test_defaults() -> None:
    found = parse("redis://localhost")
    assert (found.port, found.database, found.username, found.password) == (6379, 0, None, None)
    assert (found.tls, found.root, found.cluster) == ({}, "{postroom}:", False)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://", "write redis://"),
        ("redis://:secret@host:port", "port"),
        ("redis://:secret/x@host", "%2F"),
        ("redis://ann:secret#x@host", "%23"),
        ("redis://ann:secret\u2100@host", "%40"),
        ("redis://host/0#secret", "no '#"),
        ("redis://host/\u0663", "the database must be a number"),
        ("redis://host?namespace=a&namespace=b", "each option once"),
        ("redis://:secret@host/zero", "the database must be a number"),
        ("redis://:secret@host/0?namespce=x", "did you mean 'namespace'"),
        ("redis://:secret@host/0?timeout=3", "known are namespace"),
        ("redis://:secret@host/0?namespace={x}", "letters, digits"),
        ("redis://:secret@host/0?cluster=maybe", "cluster=yes or cluster=no"),
        ("redis://:secret@host/0?cafile=/ca.pem", "only with rediss://"),
    ],
)
def test_wrong_ones(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        parse(url)
    assert "secret" not in str(error.value)
