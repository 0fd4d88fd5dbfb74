"""For tests: the conformance suite for brokers, and a clock that stands still. Needs the extra ``testing``."""

from importlib.util import find_spec

_missing = [name for name in ("hypothesis", "pytest") if find_spec(name) is None]
if _missing:
    raise ImportError(f"postroom.testing needs {' and '.join(_missing)}: pip install 'postroom[testing]'")
