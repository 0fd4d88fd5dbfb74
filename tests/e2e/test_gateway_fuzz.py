"""A fuzzer that knows ``/openapi.json`` finds no answer that the document does not promise, and no failure of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from tests.conftest import working

from postroom import App, Reject, Upload
from postroom.gateway import Gateway
from postroom.message import new_id

TOKEN = {"Authorization": "Bearer s3cret"}
EXAMPLES = 15
"""Of each operation: enough for every branch of a small schema, in seconds."""

CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.positive_data_acceptance,
    checks.unsupported_method,
    checks.ignored_auth,
)


@dataclass
class Signup:
    user: str
    age: int = 0


class Address(pydantic.BaseModel):
    street: str
    number: int


def make(url: str, uploads: Path) -> App:
    app = App(url, uploads=uploads)

    @app.task(queue="sums")
    def add(a: int, b: int = 1, label: str | None = None) -> int:
        return a + b

    @app.task(queue="letters")
    def send(to: Address, copies: list[Address]) -> None: ...

    @app.task(queue="photos")
    def shrink(photo: Upload, width: int = 320) -> None: ...

    @app.task(queue="bad")
    def fail() -> None:
        raise Reject("no")

    @app.topic("user.signup", Signup).subscribe("mail")
    def mail(event: Signup) -> None: ...

    return app


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    place = tmp_path_factory.mktemp("fuzz")
    with make(f"sqlite:///{place}/postroom.db", place / "uploads") as app:
        job = app.tasks["fail"].enqueue()
        with working(app):
            job.outcome(20)
        yield app


@pytest.fixture(scope="module")
def schema(app: App) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", Gateway(app, token="s3cret"), headers=TOKEN)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_the_gateway_answers_as_described(schema: Any, mode: GenerationMode) -> None:
    """With what the document allows, and with what it does not."""
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    failures = []
    for operation in operations:
        try:
            fuzz(operation, mode)
        except (FailureGroup, Unsatisfiable) as error:
            if isinstance(error, FailureGroup):
                failures.append(f"{operation.label}: {error.exceptions}")
    assert not failures, "\n".join(failures)


def keep_the_rules_between_parameters(case: Any) -> None:
    """Those that no schema can state: one of delay and at; a key, or an event's source and id, is for one body."""
    if "delay" in case.query:
        case.query.pop("at", None)
    case.headers.pop("Idempotency-Key", None)
    for item in case.body if isinstance(case.body, list) else [case.body]:
        if isinstance(item, dict) and "specversion" in item:
            item["id"] = new_id()


def fuzz(operation: Any, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def one(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            keep_the_rules_between_parameters(case)
        if "wait" in case.headers.get("Prefer", ""):
            # Nobody works here, so that waiting would only cost time.
            case.headers["Prefer"] = "wait=0"
        answer = case.call(headers=TOKEN)
        # A batch of which a part is bad is accepted in part.
        partial = [checks.negative_data_rejection] if answer.status_code == 207 else []
        case.validate_response(answer, checks=list(CHECKS), excluded_checks=partial, headers=TOKEN)

    one()
