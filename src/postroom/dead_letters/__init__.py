"""Messages that failed for good: seen, redriven, discarded."""

from postroom.dead_letters.box import DeadLetters

__all__ = ["DeadLetters"]
