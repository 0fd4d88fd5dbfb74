"""The broker on a Redis or Valkey server: every move is one Lua script, and so happens whole or not at all.

Read ``scripts/common.lua`` first: it says what is kept, and what can happen to a message.
"""

from postroom.broker.redis.broker import RedisBroker

__all__ = ["RedisBroker"]
