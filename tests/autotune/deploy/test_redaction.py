import pytest

from autotune.deploy.evidence import Evidence
from autotune.deploy.redaction import redacted


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("--api-key sk-123 --port 8", "--api-key *** --port 8"),
        ("--api-key=sk-123", "--api-key=***"),
        ("--engine-args '--api-key sk-123' -o x", "--engine-args '--api-key ***' -o x"),
        ("--engine-args='--hf-token hf_1'", "--engine-args='--hf-token ***'"),
        ("HF_TOKEN=hf_1 vllm serve", "HF_TOKEN=*** vllm serve"),
        ("--api-key 'two words'", "--api-key ***"),
    ],
)
def test_values_of_secrets_are_not_written(typed: str, written: str) -> None:
    assert redacted(typed) == written


@pytest.mark.parametrize(
    "typed",
    [
        "--api-key-env SERVER_KEY",
        "--tokenizer folder --max-num-batched-tokens 2048",
        "--skip-token --more",
        "--model org/token-model",
    ],
)
def test_what_is_no_secret_stays(typed: str) -> None:
    assert redacted(typed) == typed


def test_the_command_of_a_run_can_be_typed_again_and_shows_no_key() -> None:
    command = ["autotune", "run", "--slo", "ttft<200ms", "--engine-args", "--api-key sk-123"]
    (line,) = Evidence.from_run({"command": command}).summary
    assert line == "Found by: autotune run --slo 'ttft<200ms' --engine-args '--api-key ***'"
