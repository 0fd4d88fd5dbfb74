"""The real database in which messages have their effects: accounts, a journal, and orders with their outbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from postroom.context import Context
from postroom.errors import ConfigurationError
from postroom.store.inbox import create_inbox
from postroom.store.outbox import TABLE as OUTBOX
from postroom.store.outbox import create_outbox
from postroom.torture.plan import ACCOUNTS, DEPOSIT, Errand

try:
    import sqlalchemy as sa
except ImportError as error:
    raise ConfigurationError("the torture needs sqlalchemy: pip install 'postroom[torture]'") from error

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}

_tables = sa.MetaData()
_accounts = sa.Table(
    "torture_accounts",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
)
_journal = sa.Table(
    "torture_journal",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("subscription", sa.String(127), nullable=False),
    sa.Column("token", sa.String(127), nullable=False),
)
_orders = sa.Table("torture_orders", _tables, sa.Column("token", sa.String(127), primary_key=True))


class Effect(NamedTuple):
    """One line of the journal: the effect of one message on behalf of one subscription."""

    subscription: str
    token: str


class Effects:
    """Through SQLAlchemy, so that SQLite, PostgreSQL and MySQL are one code."""

    def __init__(self, url: str) -> None:
        """Raises ``ConfigurationError``."""
        scheme, _, rest = url.partition("://")
        try:
            self.engine = sa.create_engine(f"{_DRIVERS.get(scheme, scheme)}://{rest}", pool_pre_ping=True)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as error:
            raise ConfigurationError(f"--effects: {error}") from error
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _prepare_sqlite)

    def create(self) -> None:
        """Empty tables, and the accounts with their deposits. Raises ``ConfigurationError`` if it cannot."""
        try:
            with self.engine.begin() as connection:
                _tables.drop_all(connection)
                _tables.create_all(connection)
                create_inbox(connection)
                create_outbox(connection)
                connection.execute(
                    _accounts.insert(), [{"id": number, "amount": DEPOSIT} for number in range(ACCOUNTS)]
                )
            waiting = self.waiting()
        except sa.exc.DBAPIError as error:
            raise ConfigurationError(f"--effects: the database answers: {error.orig}") from error
        if waiting:
            raise ConfigurationError(
                f"--effects: {waiting} messages lie in the outbox of this database; give the torture one of its own"
            )

    def drop(self) -> None:
        with self.engine.begin() as connection:
            _tables.drop_all(connection)

    def apply(self, connection: sa.Connection, errand: Errand, ctx: Context) -> None:
        """The effect, in the caller's transaction."""
        connection.execute(_journal.insert().values(subscription=ctx.subscription, token=errand.token))
        if errand.kind == "transfer":
            # In one order for all, so that two transfers cannot wait for each other.
            changes = sorted([(errand.source, -errand.amount), (errand.target, errand.amount)])
            for account, change in changes:
                connection.execute(
                    _accounts.update().where(_accounts.c.id == account).values(amount=_accounts.c.amount + change)
                )

    def order(self, token: str, enqueue: Callable[[sa.Connection], str], *, rollback: bool) -> str:
        """A row and a message that must stand or fall together."""
        with self.engine.connect() as connection:
            connection.execute(_orders.insert().values(token=token))
            message = enqueue(connection)
            if rollback:
                connection.rollback()
            else:
                connection.commit()
        return message

    def ordered(self) -> set[str]:
        """The tokens of what was committed."""
        with self.engine.connect() as connection:
            return {str(token) for (token,) in connection.execute(sa.select(_orders.c.token))}

    def journal(self) -> list[Effect]:
        """In the order in which they were written."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_journal.c.subscription, _journal.c.token).order_by(_journal.c.id))
            return [Effect(str(subscription), str(token)) for subscription, token in rows]

    def balances(self) -> list[int]:
        """By account."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_accounts.c.amount).order_by(_accounts.c.id))
            return [int(amount) for (amount,) in rows]

    def waiting(self) -> int:
        """Messages in the outbox, also those that were set aside."""
        with self.engine.connect() as connection:
            return int(connection.execute(sa.text(f"SELECT count(*) FROM {OUTBOX}")).scalar_one())

    def close(self) -> None:
        self.engine.dispose()


def _prepare_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # Survives the death of every process, and does not wait for the disk: the machine stays up in a run.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()
