"""No error about a URL shows a part of the password in it, whichever way it is written wrongly."""

from __future__ import annotations

import traceback

import pytest

from postroom import App
from postroom.errors import ConfigurationError

SCHEMES = ("amqp", "amqps", "kafka", "kafka+ssl", "postgresql", "redis", "rediss", "sqs")
WRONG = (
    "user:12/secret@host/x",
    "user:se/secret@host",
    "user:12#secret@host",
    "user:12?secret@host",
    "user:12?secret=x@host",
    "user:12secret@ho℀st",
    "user:12secret@[host",
    "user:12secret@host:port",
)


@pytest.mark.parametrize("rest", WRONG)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_password_is_not_shown(scheme: str, rest: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        App(f"{scheme}://{rest}").make_broker()
    assert "URL" in str(caught.value) or "://" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value, limit=0))
    assert "secret" not in shown
    assert ":12" not in shown
