"""The app: what a user makes first, and binds everything to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar, overload

from postroom.broker.base import Broker, Subscription, SubscriptionStats
from postroom.broker.thread import BrokerThread
from postroom.config import (
    LEASE,
    MAX_MESSAGE_SIZE,
    RESULT_TTL,
    HandlerOptions,
    Isolation,
    RetryPolicy,
    Seconds,
    Uniqueness,
    seconds,
)
from postroom.errors import ConfigurationError
from postroom.handler import EventHandler, TaskHandler
from postroom.lifecycle import Lifecycle, Middleware
from postroom.producer.job import Job
from postroom.producer.outlet import Outlet
from postroom.producer.publisher import Publisher
from postroom.producer.task import AsyncTask, SyncTask, Task, TaskDecorator
from postroom.producer.topic import EventType, Topic
from postroom.store.blobs import BlobStore, directory_for
from postroom.topology import Topology

if TYPE_CHECKING:
    from postroom.dead_letters import DeadLetters

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("postroom")

DEFAULT_URL = "sqlite:///postroom.db"
DEFAULT_QUEUE = "default"


class App:
    """Tasks, topics and subscriptions, on one broker.

    Making an app does no I/O: it connects, and declares what it consists of, at first use.
    """

    thread_class: ClassVar[type[BrokerThread]] = BrokerThread

    def __init__(
        self,
        url: str | None = None,
        *,
        store: str | None = None,
        uploads: str | os.PathLike[str] | None = None,
        queue_limit: int | None = None,
        max_message_size: int = MAX_MESSAGE_SIZE,
    ) -> None:
        """``url``: the broker; by default ``POSTROOM_BROKER``, else ``sqlite:///postroom.db``.

        ``store``: where status and results are kept if the broker cannot (``POSTROOM_STORE``); the embedded
        brokers keep them themselves and refuse one.
        ``uploads``: the directory for files that go with jobs; by default beside the SQLite file.
        ``queue_limit``: waiting messages of a subscription above which producers get ``QueueFull``; default none.
        ``max_message_size``: bytes of a message's body, and of a result; default 256 KiB.
        Raises ``ConfigurationError``.
        """
        self.url = url or os.environ.get("POSTROOM_BROKER") or DEFAULT_URL
        if queue_limit is not None and queue_limit < 1:
            raise ConfigurationError(f"App(queue_limit={queue_limit}): at least 1, or None")
        if max_message_size < 1:
            raise ConfigurationError(f"App(max_message_size={max_message_size}): bytes, at least 1")
        self._store = store or os.environ.get("POSTROOM_STORE")
        self.max_message_size = max_message_size
        self.topology = Topology(queue_limit)
        self.lifecycle = Lifecycle()
        self.thread = self.thread_class(self.make_broker, self._declare)
        self.blobs = BlobStore(directory_for(uploads, self.url))
        publisher = Publisher(self.thread, max_message_size=max_message_size)
        self.outlet = Outlet(self.thread, publisher, self.blobs, self.make_broker)
        self.tasks: dict[str, Task[..., Any]] = {}
        self.topics: dict[str, Topic[Any]] = {}

    # Building the app

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncTask[P, T]: ...  # type: ignore[overload-overlap]
    @overload
    def task(self, function: Callable[P, T], /) -> SyncTask[P, T]: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        lease: float | None = None,
        priority: int = 0,
        ordered: bool = False,
        isolation: Isolation | None = None,
        result_ttl: Seconds = RESULT_TTL,
        unique: Uniqueness | None = None,
        transaction: Any = None,
    ) -> TaskDecorator: ...
    def task(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        lease: float | None = None,
        priority: int = 0,
        ordered: bool = False,
        isolation: Isolation | None = None,
        result_ttl: Seconds = RESULT_TTL,
        unique: Uniqueness | None = None,
        transaction: Any = None,
    ) -> Any:
        """Decorator: make a function a task.

        ``name``: the function's name by default; unique within the app.
        ``queue``: tasks of one queue share its workers; ``"default"`` by default.
        ``retry``: see :class:`RetryPolicy`; 5 attempts by default.
        ``timeout``: seconds one attempt may take; no limit by default. Ends async handlers and processes for
        certain; a thread only once it runs Python code again.
        ``lease``: seconds after which the message of a frozen worker goes to another; 30 by default.
        ``priority``: 0 (default) to 9; higher runs first.
        ``ordered``: run messages of one ``key`` one at a time, in the order they were enqueued.
        ``isolation="process"``: run in a process of its own, which may crash or be killed.
        ``result_ttl``: seconds for which status and result are kept after the end; 24 h by default.
        ``unique``: the same call is one job ``"until_done"``, ``"until_started"``, or for so many seconds.
        ``transaction``: run each message in a transaction, with exactly one effect: it is opened, the message marked
        as by ``ctx.once``, and all committed when the function has returned; a duplicate does not run, and has the
        first result. An engine or sessionmaker of SQLAlchemy, a pool of asyncpg or psycopg, Django's connection, the
        class of a resource that is one of these, or a function that opens a connection (it is closed afterwards) or
        a context manager that gives one and commits. A parameter annotated with the connection's class receives it.
        Raises ``ConfigurationError``.
        """
        options = _handler_options(
            retry, timeout, lease, ordered, isolation, transaction,
            priority=priority, result_ttl=seconds(result_ttl, "result_ttl"), unique=unique,
        )  # fmt: skip

        def decorate(target: Callable[..., Any]) -> Task[..., Any]:
            handler = TaskHandler(
                target,
                name=name or target.__name__,
                subscription=queue,
                options=options,
                resources=self.lifecycle.resources,
            )
            self.topology.add_task(handler)
            self.thread.prepare_again()
            made: Task[..., Any] = (AsyncTask if handler.is_async else SyncTask)(handler, self.outlet)
            self.tasks[handler.name] = made
            return made

        return decorate if function is None else decorate(function)

    @overload
    def topic(self, name: str, event_type: type[T], *, retention: Seconds | None = None) -> Topic[T]: ...
    @overload
    def topic(self, name: str, *, retention: Seconds | None = None) -> Topic[Any]: ...
    def topic(self, name: str, event_type: Any = Any, *, retention: Seconds | None = None) -> Topic[Any]:
        """Declare a topic whose events have ``event_type`` (default: any JSON value).

        ``retention``: how long published events are kept for subscriptions with ``start="earliest"`` and for
        replay; 0 keeps none, default 24 h where the broker keeps history at all. Raises ``ConfigurationError``.
        """
        event = EventType(name, event_type)
        self.topology.add_topic(name, None if retention is None else seconds(retention, "retention"))
        self.thread.prepare_again()
        made: Topic[Any] = Topic(event, self.outlet, self.subscribe)
        self.topics[name] = made
        return made

    def subscribe(
        self,
        pattern: str,
        name: str,
        *,
        where: dict[str, str] | None = None,
        start: Literal["latest", "earliest"] = "latest",
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        lease: float | None = None,
        ordered: bool = False,
        isolation: Isolation | None = None,
        transaction: Any = None,
    ) -> Callable[[F], F]:
        """Decorator: the function handles every event that matches, under a durable subscription ``name``.

        ``pattern``: a topic, or words with ``*`` (one word) and ``#`` (any number of words).
        ``where``: only events whose headers have all of these values.
        ``start``: when first declared: events from now on, or (``"earliest"``) also those still retained.
        The others as in :meth:`task`. Raises ``ConfigurationError``.
        """
        if start not in ("latest", "earliest"):
            raise ConfigurationError(f"subscription {name!r}: start={start!r}: 'latest' or 'earliest'")
        options = _handler_options(retry, timeout, lease, ordered, isolation, transaction)

        def decorate(function: F) -> F:
            topic = self.topics.get(pattern)
            handler = EventHandler(
                function,
                name=name,
                subscription=name,
                options=options,
                resources=self.lifecycle.resources,
                event_type=topic.event.type if topic else Any,
            )
            subscription = Subscription(name=name, pattern=pattern, where=where or {}, start=start, ordered=ordered)
            self.topology.add_subscription(subscription, handler)
            self.thread.prepare_again()
            return function

        return decorate

    def resource(self, factory: F) -> F:
        """Decorator: the function opens something once per worker process, for handlers that ask for its type.

        A generator function ``def pool() -> Iterator[Pool]`` (or async) that yields it once and then closes it.
        Parameters annotated with that very type receive it. Raises ``ConfigurationError``.
        """
        self.lifecycle.add_resource(factory)
        return factory

    def lifespan(self, hook: F) -> F:
        """Decorator: a generator function (or async) around the life of each worker process: start, yield, stop."""
        self.lifecycle.add_hook(hook)
        return hook

    def middleware(self, middleware: Middleware) -> Middleware:
        """Decorator: ``async def middleware(ctx, call_next)`` around every handler; the first added is outermost.

        It returns what ``await call_next()`` returned, or something else; what it raises counts as the handler's.
        """
        self.lifecycle.middleware.append(middleware)
        return middleware

    # Operating it

    def job(self, job_id: str) -> Job[Any]:
        """A handle on the job with this id; no I/O."""
        return Job(job_id, self.thread)

    def dead_letters(self, subscription: str) -> DeadLetters:
        """The dead letters of a queue or subscription."""
        from postroom.dead_letters import DeadLetters

        return DeadLetters(self.thread, self.blobs, subscription)

    def stats(self) -> list[SubscriptionStats]:
        """Every queue and subscription of the broker in numbers."""
        return self.thread.call(_stats)

    async def astats(self) -> list[SubscriptionStats]:
        """See :meth:`stats`."""
        return await self.thread.acall(_stats)

    def replay(self, subscription: str, *, since: float | None = None) -> int:
        """Deliver retained events once more to one subscription; those that have not ended are left alone.

        ``since``: only what was published since that unix time; by default all. Returns how many.
        Raises ``SubscriptionNotFound``, or ``UnsupportedOperation`` where the broker retains nothing.
        """
        return self.thread.call(lambda broker: broker.replay(subscription, since))

    async def areplay(self, subscription: str, *, since: float | None = None) -> int:
        """See :meth:`replay`."""
        return await self.thread.acall(lambda broker: broker.replay(subscription, since))

    def unsubscribe(self, subscription: str) -> None:
        """Delete a subscription, or a queue, with all it holds: dead letters and records too.

        An app that still defines it declares it anew when it connects. Raises ``SubscriptionNotFound``.
        """
        self.thread.call(lambda broker: broker.unsubscribe(subscription))

    async def aunsubscribe(self, subscription: str) -> None:
        """See :meth:`unsubscribe`."""
        await self.thread.acall(lambda broker: broker.unsubscribe(subscription))

    def connect(self) -> None:
        """Connect and declare now rather than at first use. Raises ``BrokerUnavailable`` or ``ConfigurationError``."""
        self.thread.call(_nothing)

    async def aconnect(self) -> None:
        """See :meth:`connect`."""
        await self.thread.acall(_nothing)

    def run_worker(
        self,
        *,
        concurrency: int = 50,
        queues: Sequence[str] | None = None,
        drain: bool = False,
        grace: float = 30.0,
        relay: str | None = None,
        spare: bool = True,
    ) -> None:
        """Run a worker in this process until SIGTERM or SIGINT; to be called in the main thread.

        ``concurrency``: handlers that run at once. ``queues``: only these queues and subscriptions.
        ``drain``: stop once nothing is ready or running. ``grace``: seconds that running handlers have after
        the signal. ``relay``: the URL of a database whose outbox it sends to the broker beside its work.
        ``spare``: keep a child process ready for what a dead worker had started. Raises ``ConfigurationError``.
        """
        from postroom.worker.process import WorkerOptions, run

        run(
            self,
            WorkerOptions(concurrency=concurrency, queues=queues, drain=drain, grace=grace, relay=relay, spare=spare),
        )

    def asgi(self, **options: Any) -> Any:
        """The HTTP gateway as an ASGI app, to be mounted or served; options as in ``postroom.gateway.Gateway``."""
        from postroom.gateway import Gateway

        return Gateway(self, **options)

    def close(self) -> None:
        """Disconnect. The app cannot be used afterwards."""
        self.thread.close()

    def __enter__(self) -> App:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Read all handlers' parameters, and refuse now what would fail later. Raises ``ConfigurationError``."""
        for handler in (*self.topology.tasks.values(), *self.topology.events.values()):
            handler.compile()

    def make_broker(self) -> Broker:
        """One more broker of this app, with its store, not connected. Raises ``ConfigurationError``."""
        from postroom.broker.registry import make_broker
        from postroom.store.registry import with_store

        return with_store(make_broker(self.url), self._store)

    async def _declare(self, broker: Broker) -> None:
        from postroom.broker.demands import check_tasks, check_topology

        if not broker.capabilities.jobs:
            logger.warning(
                "no store is set: this broker keeps no job status, no results and no idempotency keys, and jobs "
                "cannot be cancelled; set App(store=…) or POSTROOM_STORE, as sqlite:///jobs.db, to have them"
            )
        topics = self.topology.topics_on(broker.capabilities)
        check_topology(broker.capabilities, topics, self.topology.subscriptions)
        check_tasks(broker.capabilities, self.topology.tasks.values())
        await broker.declare(topics, self.topology.subscriptions)


def _handler_options(
    retry: RetryPolicy | None,
    timeout: float | None,
    lease: float | None,
    ordered: bool,
    isolation: Isolation | None,
    transaction: Any,
    *,
    priority: int = 0,
    result_ttl: float = RESULT_TTL,
    unique: Uniqueness | None = None,
) -> HandlerOptions:
    return HandlerOptions(
        retry=retry or RetryPolicy(),
        timeout=timeout,
        lease=LEASE if lease is None else lease,
        ordered=ordered,
        isolation=isolation,
        transaction=transaction,
        priority=priority,
        result_ttl=result_ttl,
        unique=unique,
    )


async def _stats(broker: Broker) -> list[SubscriptionStats]:
    return await broker.stats()


async def _nothing(broker: Broker) -> None:
    """Being connected is all that is asked."""
