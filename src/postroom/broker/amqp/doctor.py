"""What can be wrong with a RabbitMQ server, as far as a client may look. Only looks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pika import BasicProperties  # type: ignore[import-untyped]

from postroom.broker.amqp import ladder
from postroom.broker.amqp.address import Address
from postroom.broker.amqp.confirms import Post, Publisher
from postroom.broker.amqp.link import NOT_FOUND, Link, Refused
from postroom.broker.amqp.topology import State, version_of
from postroom.doctor import Finding, Level
from postroom.errors import BrokerUnavailable

OLDEST = (3, 10)
"""At-least-once dead-lettering came with it (rabbitmq.com/docs/quorum-queues)."""
_MANY = 100_000


async def examine(link: Link, publisher: Publisher, address: Address, state: State) -> list[Finding]:
    findings = [_version(link.server), _transport(address), _user(address)]
    findings += [await _permissions(link, address), await _alarms(publisher, address)]
    findings += [finding async for finding in _topology(link, address, state)]
    return findings


def _version(server: dict[str, Any]) -> Finding:
    version, product = version_of(server), str(server.get("product", "an AMQP server"))
    told = f"{product} {server.get('version', '?')}"
    if product != "RabbitMQ":
        return _told("warning", "version", f"{told}; Postroom is proven on RabbitMQ only", "use RabbitMQ 3.10 or newer")
    if version < OLDEST:
        remedy = "upgrade to 3.10 or newer"
        return _told("error", "version", f"{told} loses messages when it moves them from queue to queue", remedy)
    return _told("ok", "version", told)


def _transport(address: Address) -> Finding:
    local = all(host in ("localhost", "127.0.0.1", "::1") for host, _ in address.hosts)
    if address.tls or local:
        return _told("ok", "encryption", "TLS" if address.tls else "none needed on this machine")
    return _told("warning", "encryption", "password and messages cross the network in clear", "write amqps://")


def _user(address: Address) -> Finding:
    if address.user == "guest" and not all(host in ("localhost", "127.0.0.1", "::1") for host, _ in address.hosts):
        remedy = "rabbitmqctl add_user postroom …; rabbitmqctl delete_user guest"
        return _told("warning", "user", "everybody knows the password of guest", remedy)
    return _told("ok", "user", address.user)


async def _permissions(link: Link, address: Address) -> Finding:
    """Tried with a queue that ends with its connection, and an exchange that ends with the queue's binding to it."""
    name = address.internal("doctor")
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("configure", "queue_declare", {"queue": name, "exclusive": True, "auto_delete": True}),
        ("configure", "exchange_declare", {"exchange": name, "auto_delete": True}),
        ("read", "queue_purge", {"queue": name}),
        ("write", "queue_bind", {"queue": name, "exchange": name, "routing_key": name}),
    ]
    for permission, method, arguments in steps:
        channel = await link.channel()
        try:
            await channel.call(method, **arguments)
        except Refused as error:
            return _told("error", "permissions", f"no permission to {permission}: {error.told}", address.permit)
        finally:
            await channel.close()
    channel = await link.channel()
    await channel.call("queue_delete", queue=name)
    await channel.close()
    return _told("ok", "permissions", "configure, read and write")


async def _alarms(publisher: Publisher, address: Address) -> Finding:
    """A message to nowhere: it comes back, unless the server takes nothing at all."""
    nowhere = Post("", address.internal("doctor"), BasicProperties(message_id="doctor"), b"")
    try:
        # A server that is short of something tells so when it is first written to, and only then.
        await publisher.send([nowhere])
        await publisher.send([nowhere])
    except BrokerUnavailable as error:
        if isinstance(error.__cause__, Refused):
            return _told("error", "permissions", f"no permission to write: {error.__cause__.told}", address.permit)
        remedy = "give it memory and disk; rabbitmq-diagnostics alarms tells which is short"
        return _told("error", "alarms", str(error), remedy)
    return _told("ok", "alarms", "it takes messages")


async def _topology(link: Link, address: Address, state: State) -> AsyncIterator[Finding]:
    missing, lonely, piled = [], [], []
    for name in sorted(state.subscriptions):
        for queue in (address.queue(name), address.dead(name)):
            found = await _look(link, queue)
            if found is None:
                missing.append(queue)
            elif found.method.message_count > _MANY:
                piled.append(f"{queue} ({found.method.message_count:,})")
        waiting = await _look(link, address.queue(name))
        if waiting is not None and waiting.method.message_count and not waiting.method.consumer_count:
            lonely.append(name)
    again = "start the app once more: it declares what is missing"
    if state.subscriptions:
        yield _listed("queues", "error", missing, "gone from the server", again, f"{len(state.subscriptions)} found")
        yield _listed(
            "workers", "warning", lonely, "messages but nobody to take them", "start a worker", "none is missing"
        )
        remedy = "add workers, or set a policy max-length for them"
        yield _listed("depth", "warning", piled, f"more than {_MANY:,} messages", remedy, f"none above {_MANY:,}")
        steps = [ladder.step(address, level) for level in range(ladder.LEVELS)]
        broken = [queue for queue in steps if await _look(link, queue) is None]
        yield _listed("delays", "error", broken, "gone: retries and delays cannot be stored", again, "complete")
        lost = await _look(link, address.internal("delay:lost"))
        count = 0 if lost is None else int(lost.method.message_count)
        if count:
            detail = f"{count} delayed messages came for subscriptions that were gone"
            yield _told(
                "warning", "undeliverable", detail, f"look at the queue {address.internal('delay:lost')}, purge it"
            )
    ordered = [name for name, subscription in sorted(state.subscriptions.items()) if subscription.ordered]
    if version_of(link.server) < (3, 12) and ordered:
        yield _told(
            "warning",
            "long tasks",
            "this server takes back what is not settled within its consumer_timeout, half an hour unless set; no task "
            f"of an ordered subscription ({', '.join(ordered)}), and no delay of its retries, may be longer",
            "if one is: consumer_timeout = 86400000 (milliseconds) in rabbitmq.conf, or RabbitMQ 3.12",
        )


async def _look(link: Link, queue: str) -> Any:
    channel = await link.channel()
    try:
        return await channel.call("queue_declare", queue=queue, passive=True)
    except Refused as error:
        if error.code == NOT_FOUND:
            return None
        raise
    finally:
        await channel.close()


def _listed(title: str, level: Level, names: list[str], detail: str, remedy: str, fine: str) -> Finding:
    if names:
        return _told(level, title, f"{detail}: {', '.join(names)}", remedy)
    return _told("ok", title, fine)


def _told(level: Level, title: str, detail: str, remedy: str = "") -> Finding:
    return Finding(level=level, title=title, detail=detail, remedy=remedy)
