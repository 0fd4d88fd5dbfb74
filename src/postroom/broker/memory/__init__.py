"""The broker inside one process: the executable reference of the contract, and the one tests should use.

Read it from the inside out: ``copy`` (one message in one subscription), ``subscription`` (who is
next), ``state`` (what can happen to a copy), ``consumer`` and ``broker`` (the contract).
"""

from postroom.broker.memory.broker import MemoryBroker, forget

__all__ = ["MemoryBroker", "forget"]
