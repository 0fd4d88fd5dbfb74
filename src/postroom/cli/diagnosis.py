"""What ``postroom doctor`` looks at on every broker: can it be reached, what does it promise, does the app fit it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Iterator
from urllib.parse import urlsplit

from postroom import App, ConfigurationError, PostroomError, UnsupportedOperation
from postroom.broker.base import Broker, Capabilities, SubscriptionStats
from postroom.broker.demands import check_topology
from postroom.doctor import Finding

_CREDENTIALS = ("auth", "password", "credential", "access_refused", "access refused", "accessdenied", "noperm", "403")
_REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (ssl.SSLError, "check that the URL's scheme and port are those for TLS, and that this machine trusts the "
                   "certificate and finds it valid for that host name"),
    (socket.gaierror, "check the host name in the URL, and whether this machine or container can look it up"),
    (ConnectionRefusedError, "nothing listens there: start the server, or correct host and port of the URL"),
    (PermissionError, "run as a user who may read and write there, or change owner or permissions"),
    (TimeoutError, "check host and port of the URL, the firewall between here and there, and the server's load"),
    (ConnectionError, "the other side hung up: check that the port is that of this kind of server, and its log"),
)  # fmt: skip


async def diagnose(app: App, *, timeout: float) -> list[Finding]:
    """All findings, on a broker of its own. Declares nothing. ``timeout``: seconds for each of the steps."""
    try:
        app.check()
        broker = app.make_broker()
    except ConfigurationError as error:
        return [Finding(level="error", title="configuration", detail=str(error), remedy=_remedy(error))]
    try:
        refused = await _tried(broker.connect(), "connection", timeout)
        if refused is not None:
            return [refused, *await _examined(broker, timeout)]
        findings = [Finding(level="ok", title="connection", detail=public(app.url)), *promises(broker.capabilities)]
        findings += app_fits(app, broker.capabilities)
        findings += await _in_numbers(app, broker, timeout)
        return findings + await _examined(broker, timeout)
    finally:
        await broker.close()


def public(url: str) -> str:
    """The URL without user, password and options, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def promises(capabilities: Capabilities) -> Iterator[Finding]:
    """Where the broker promises less than the others do."""
    title = "durability"
    survives = {
        "process": "the death of every process; the settings of the server decide of a power cut",
        "fsync": "a power cut",
        "replicated": "the loss of a machine, if others have copies",
    }.get(capabilities.durability)
    if survives is not None:
        yield Finding(level="ok", title=title, detail=f"what is confirmed survives {survives}")
    else:
        detail = f"what is confirmed is lost with the end of this process (durability: {capabilities.durability})"
        remedy = "for jobs that must not be lost choose a broker with durability fsync or replicated"
        yield Finding(level="warning", title=title, detail=detail, remedy=remedy)
    if not capabilities.jobs:
        detail = "none: no job status, no results, no cancelling, no idempotency keys"
        remedy = "set App(store=…) or POSTROOM_STORE, for example sqlite:///jobs.db"
        yield Finding(level="warning", title="store", detail=detail, remedy=remedy)


def app_fits(app: App, capabilities: Capabilities) -> Iterator[Finding]:
    """Whether the broker can do what the tasks and subscriptions ask for."""
    if not app.topology.subscriptions:
        return
    title = "what the app asks for"
    try:
        check_topology(capabilities, app.topology.topics_on(capabilities), app.topology.subscriptions)
    except UnsupportedOperation as error:
        remedy = f"see {error.capability} in the table of what each broker can do (docs/semantics.md)"
        yield Finding(level="error", title=title, detail=str(error), remedy=remedy)
    else:
        detail = f"the broker can do it (queues and subscriptions: {len(app.topology.subscriptions)})"
        yield Finding(level="ok", title=title, detail=detail)


def letters(stats: list[SubscriptionStats]) -> Finding:
    """Dead letters are kept for somebody to look at."""
    dead = [item for item in stats if item.dead]
    if not dead:
        return Finding(level="ok", title="dead letters", detail="none")
    detail = ", ".join(f"{item.dead} in {item.name}" for item in dead)
    return Finding(level="warning", title="dead letters", detail=detail, remedy=f"postroom dead list {dead[0].name}")


def strangers(app: App, stats: list[SubscriptionStats]) -> Iterator[Finding]:
    """What is on the broker but not in the app: it goes on collecting copies that nobody may ever handle."""
    if not app.topology.subscriptions:
        return
    known = {subscription.name for subscription in app.topology.subscriptions}
    names = ", ".join(item.name for item in stats if item.name not in known)
    if names:
        remedy = "if no other app works on them: app.unsubscribe(name)"
        detail = f"on the broker, but not in this app: {names}"
        yield Finding(level="warning", title="subscriptions", detail=detail, remedy=remedy)


async def _in_numbers(app: App, broker: Broker, timeout: float) -> list[Finding]:
    found: list[SubscriptionStats] = []

    async def ask() -> None:
        found.extend(await broker.stats())

    failed = await _tried(ask(), "statistics", timeout)
    return [failed] if failed is not None else [letters(found), *strangers(app, found)]


async def _examined(broker: Broker, timeout: float) -> list[Finding]:
    found: list[Finding] = []

    async def ask() -> None:
        found.extend(await broker.examine())

    failed = await _tried(ask(), "examination", timeout)
    return found if failed is None else [failed]


async def _tried(operation: Awaitable[None], title: str, timeout: float) -> Finding | None:
    """What went wrong with it; ``None`` if nothing."""
    try:
        async with asyncio.timeout(timeout):
            await operation
    except PostroomError as error:
        return Finding(level="error", title=title, detail=str(error), remedy=_remedy(error))
    except TimeoutError as error:
        return Finding(level="error", title=title, detail=f"no answer within {timeout:g} s", remedy=_remedy(error))
    return None


def _remedy(error: BaseException) -> str:
    """By the root of the matter, as far as the chain of causes tells it."""
    if isinstance(error, ConfigurationError):
        return "change what the message names"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for link in reversed(chain):
        for kind, remedy in _REMEDIES:
            if isinstance(link, kind):
                return remedy
        if any(word in f"{type(link).__name__} {link}".lower() for word in _CREDENTIALS):
            return "check user, password and rights in the URL or the environment against those of the server"
    return "see the message, and the server's log"
