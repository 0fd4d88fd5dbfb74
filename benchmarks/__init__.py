"""Measurements of Postroom beside a floor written in raw SQL. Run by ``python -m benchmarks``."""
