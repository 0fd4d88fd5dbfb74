"""For authors of brokers: a conformance suite to run on theirs, and what it is made of.

``harness`` is the one class to write, ``conformance`` the tests, ``clock`` a clock that stands still, ``history`` and
``checker`` tell from a record of operations what was lost or duplicated, ``state_machine`` looks for sequences
nobody thought of, ``defects`` proves that the tests can fail. Needs the extra ``testing``.
"""

from importlib.util import find_spec

_missing = [name for name in ("hypothesis", "pytest") if find_spec(name) is None]
if _missing:
    raise ImportError(f"postroom.testing needs {' and '.join(_missing)}: pip install 'postroom[testing]'")

import pytest  # noqa: E402

# Before they are imported: otherwise a failed assertion of the suite shows no values.
pytest.register_assert_rewrite("postroom.testing.conformance", "postroom.testing.scene", "postroom.testing.checker")
