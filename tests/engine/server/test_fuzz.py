"""The server against its own OpenAPI description: whatever it takes and answers, as it says.

`FUZZ_EXAMPLES` sets how many requests each operation gets; a few by default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from engine.server.app import create_app
from engine.server.async_engine import AsyncEngine
from engine.server.limits import ServerLimits
from engine.server.served_model import ServedModel
from engine.server.settings import ServerSettings
from tests.engine.server.tiny_served import NAME, load_tiny, over_http

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
# Why a request that the schema allows may still be refused: what a schema cannot say.
BEYOND_SCHEMAS = {
    "context_length_exceeded",  # lengths in tokens
    "empty_prompt",  # likewise
    "invalid_combination",
    "invalid_messages",  # the chat template has its own opinion
    "request_refused",  # by the engine, for room
    "unsupported_parameter",  # two fields together
}
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[tuple[str, AsyncEngine]]:
    loaded, config = load_tiny(tiny_folder)
    model = ServedModel.of(loaded, config, names=[NAME])
    # Outputs are short, so that a request without max_tokens is.
    limits = ServerLimits(max_output_tokens=64, request_timeout_s=30)
    engine = AsyncEngine(loaded.engine(config), limits=limits)
    with over_http(create_app(engine, model, ServerSettings(limits=limits))) as url:
        yield url, engine
        assert engine.num_unfinished == 0
        assert engine.failed is None
    assert engine.engine.pool.num_used == 0
    engine.close()


@pytest.fixture(scope="module")
def schema(server: tuple[str, AsyncEngine]) -> Any:
    accepted = {"expected-statuses": ["2xx", "400", "404"]}  # see below
    config = schemathesis.Config.from_dict({"checks": {"positive_data_acceptance": accepted}})
    return schemathesis.openapi.from_url(f"{server[0]}/openapi.json", config=config)


def refused_with_reason(_context: Any, response: Any, case: Any) -> None:
    """What the schema allows is refused only for reasons that no schema can state."""
    if not case.meta.generation.mode.is_positive:
        return
    if response.status_code == 400:
        assert response.json()["error"]["code"] in BEYOND_SCHEMAS, response.json()
    if response.status_code == 404:
        assert case.path == "/v1/models/{model}"


def test_every_operation_does_as_it_says(schema: Any) -> None:
    def check(case: Any) -> None:
        case.call_and_validate(additional_checks=[refused_with_reason], timeout=30)

    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 6
    for operation in operations:
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.body:  # else there is nothing to do wrong
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:
            FUZZ(given(case=operation.as_strategy(generation_mode=mode))(check))()


def test_answers_lead_to_further_requests(schema: Any) -> None:
    class Machine(schema.as_state_machine()):  # type: ignore[misc]
        def validate_response(self, response: Any, case: Any, **options: Any) -> None:
            options["additional_checks"] = [refused_with_reason]
            super().validate_response(response, case, **options)

    Machine.run(settings=settings(FUZZ, stateful_step_count=4))
