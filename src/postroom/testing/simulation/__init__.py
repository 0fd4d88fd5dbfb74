"""Deterministic simulation: worker, inbox and embedded brokers on a machine of which every step is drawn from a seed.

``machine`` and ``lane`` are time and threads, ``system`` and ``sql`` what programs see of the operating system and the
disk, ``faults`` what goes wrong. ``app``, ``programs``, ``plan`` and ``bank`` are what runs, ``line`` and ``observed``
what is noted of it, ``verdict`` what must not have happened. ``world`` puts one run together, ``hunt`` runs many.
"""
