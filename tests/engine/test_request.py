import pytest

from engine.errors import ConfigError
from engine.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must lie in"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": 0.0}, "top_p=0 keeps no token"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty=-2.5"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8"),
        ({"logprobs": 101}, "logprobs=101"),
        ({"stop": ["a", ""]}, "empty text"),
        ({"stop": ""}, "empty text"),
    ],
)
def test_bad_sampling_parameters_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_the_bounds_themselves_are_allowed() -> None:
    SamplingParams(max_tokens=None, temperature=0.0, top_k=-1, top_p=1.0, min_p=1.0, logprobs=0)
    SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, min_tokens=8, max_tokens=8)


def test_a_lone_stop_text_is_one_text_and_lists_are_frozen() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    ids = [1, 2]
    params = SamplingParams(stop=["a", "b"], stop_token_ids=ids)
    ids.append(3)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2)))


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_a_request_counts_prompt_output_and_what_is_pending() -> None:
    request = Request("a", [1, 2, 3], SamplingParams(), arrival=0.5)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (3, 0)
    request.num_computed_tokens = 3
    request.token_ids.append(9)
    assert request.output_token_ids == [9]
    assert request.num_pending_tokens == 1
    twin = Request("a", [1, 2, 3], SamplingParams(), arrival=0.5)
    assert request != twin  # one request is itself, however equal another looks
    assert len({request, twin}) == 2
