"""Records in Redis: for workers of many machines, beside whichever broker."""

from postroom.store.redis.store import RedisStore

__all__ = ["RedisStore"]
