"""The reference broker: the contract in plain Python, for tests and for reading."""

from postroom.broker.memory.broker import MemoryBroker

__all__ = ["MemoryBroker"]
