"""The embedded broker: many processes, one SQLite file, nothing to install.

The standard library's ``sqlite3`` is used on purpose. Another copy of SQLite in the same process would not share
its locks with users' own ``sqlite3`` connections to the file, and both would write at once
(https://www.sqlite.org/howtocorrupt.html, section 2.2.1).
"""

from postroom.broker.sqlite.broker import SQLiteBroker

__all__ = ["SQLiteBroker"]
