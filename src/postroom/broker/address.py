"""URLs of servers, taken apart so that no error shows the password in them."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from postroom.errors import ConfigurationError


def split(url: str) -> SplitResult:
    """The parts of ``url``, none of them decoded.

    Raises ``ConfigurationError`` if a password in it is not escaped: cut off at its own slash, its beginning would be
    taken for the host, and its end for a database or an option, and be shown as such.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = None  # The error has the password in it.
    if parts is None or "@" in parts.path + parts.query + parts.fragment:
        scheme = url.partition(":")[0]
        raise ConfigurationError(
            f"URL {scheme}://…: it cannot be taken apart; in user, password and options write %2F for '/', %23 "
            "for '#', %3F for '?' and %40 for '@'"
        )
    return parts
