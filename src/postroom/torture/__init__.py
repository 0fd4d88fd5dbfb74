"""``postroom torture``: processes that produce, relay and work while others kill, freeze and cut; then the accounts.

``plan`` is what will be done, drawn from a seed; ``run`` does it with ``processes`` and their ``nemesis``; each process
notes what happens in a file of its own (``postroom.testing.history``); ``check`` compares the files, the database of
the effects and the dead letters with the plan; ``report`` shows it.
"""
