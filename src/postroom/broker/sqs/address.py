"""Where the service is, and what our queues and topics are called there."""

from __future__ import annotations

import re
from difflib import get_close_matches
from hashlib import sha256
from urllib.parse import parse_qsl

import msgspec

from postroom.broker.address import split
from postroom.errors import ConfigurationError

FIFO = ".fifo"
"""How the service marks a queue that keeps order."""
DEAD = "--dead"

_LONGEST = 80 - len(DEAD) - len(FIFO)
"""A queue's name has at most 80 characters (SQS Developer Guide, "Message queue quotas")."""
_REGULAR = re.compile(r"[A-Za-z0-9]+(?:[.-][A-Za-z0-9]+)*")
_OPTIONS = ("endpoint_url", "namespace", "wait")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """An ``sqs://`` URL, taken apart."""

    region: str | None
    """``None``: the usual chain decides (``AWS_REGION``, profile)."""
    endpoint_url: str | None = None
    """Where an emulator or a private endpoint listens, for SQS, SNS and STS."""
    namespace: str = "postroom"
    """How every queue and topic begins."""
    wait: int = 1
    """Seconds that a receive may wait at the service, 1 to 20."""

    @property
    def prefix(self) -> str:
        return f"{self.namespace}-"

    def place(self, name: str, *, ordered: bool = False, dead: bool = False) -> str:
        """The name at the service of a topic, a subscription's queue, or the queue of its dead letters.

        Dots become underscores; what could then be mistaken for another, or is too long, ends in a hash.
        """
        stem = name.replace(".", "_")
        if not _REGULAR.fullmatch(name) or len(self.prefix + stem) > _LONGEST:
            safe = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[: _LONGEST - len(self.prefix) - 10]
            stem = f"{safe}--{sha256(name.encode()).hexdigest()[:8]}"
        return self.prefix + stem + (DEAD if dead else "") + (FIFO if ordered else "")

    def name_at(self, place: str) -> str | None:
        """The topic whose ``place`` that is; ``None`` if only its tags can tell."""
        stem = place.removeprefix(self.prefix)
        return None if "--" in stem else stem.replace("_", ".")


def parse(url: str) -> Address:
    """Raises ``ConfigurationError`` that names the part which is wrong, and repeats no secret."""
    parts = split(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "broker URL sqs://…@…: keys do not belong into the URL; they come from the usual AWS chain "
            "(AWS_ACCESS_KEY_ID, a profile, the role of the machine)"
        )
    if parts.scheme != "sqs" or parts.path.strip("/") or parts.fragment:
        raise ConfigurationError(f"broker URL {parts.scheme}://…: write sqs://region, as sqs://eu-west-1")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            near = get_close_matches(option, _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(_OPTIONS)}"
            raise ConfigurationError(f"broker URL sqs://…: no option {option!r}; {hint}")
    region = parts.netloc or None
    if region is not None and not re.fullmatch(r"[a-z]+(?:-[a-z]+)+-\d+", region):
        raise ConfigurationError(f"broker URL sqs://{region}: a region is written as eu-west-1")
    endpoint = options.get("endpoint_url")
    if endpoint is not None and not re.fullmatch(r"https?://[^/?#@\s]+/?", endpoint):
        raise ConfigurationError("broker URL sqs://…: endpoint_url is written as http://127.0.0.1:4588")
    namespace = options.get("namespace", "postroom")
    if not re.fullmatch(r"[A-Za-z0-9]{1,24}", namespace):
        raise ConfigurationError(f"broker URL sqs://…: namespace={namespace!r}: 1 to 24 letters and digits")
    wait = options.get("wait", "1")
    if not re.fullmatch(r"[0-9]{1,2}", wait) or not 1 <= int(wait) <= 20:
        raise ConfigurationError(f"broker URL sqs://…: wait={wait!r}: whole seconds, 1 to 20")
    return Address(region=region, endpoint_url=endpoint, namespace=namespace, wait=int(wait))
