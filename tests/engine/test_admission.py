import pytest

from engine.request import FinishReason, Request, RequestState
from tests.engine.scheduling import finish_all, make_request, make_scheduler, step


@pytest.mark.parametrize(
    ("request_", "knobs", "reason"),
    [
        (make_request("a", []), {}, "prompt is empty"),
        (make_request("a", [1, 50, 2]), {}, "token id 50; ids must be from 0 to 49"),
        (make_request("a", [1, -1, 2]), {}, "token id -1"),
        (make_request("a", 256), {}, "prompt of 256 tokens .* max_model_len=256; at most 255"),
        (make_request("a", 20, 64), {"num_blocks": 10}, "holds 80 tokens, .* may need 83"),
        (make_request("a", 90, None), {"num_blocks": 10}, "holds 80 tokens, .* may need 90"),
        (
            make_request("a", 65),
            {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_chunked_prefill": False},
            "max_num_batched_tokens=64 and enable_chunked_prefill is off",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(
    request_: Request, knobs: dict[str, int], reason: str
) -> None:
    scheduler = make_scheduler(**knobs)  # type: ignore[arg-type]
    assert not scheduler.add(request_)
    assert request_.state is RequestState.FINISHED
    assert request_.finish_reason is FinishReason.REFUSED
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(request_.refusal)
    assert scheduler.num_unfinished == 0
    assert scheduler.next_wakeup(0.0) is None


def test_the_largest_request_that_fits_alone_is_served() -> None:
    # 10 blocks hold 80 tokens; the last token of 81 is never computed.
    scheduler = make_scheduler(num_blocks=10)
    request = make_request("a", 20, 61)
    assert scheduler.add(request)
    assert finish_all(scheduler) == ["a"]
    assert request.num_output_tokens == 61
    assert not scheduler.add(make_request("b", 20, 62))


def test_without_max_tokens_output_ends_at_the_model_or_the_cache() -> None:
    for num_blocks, total in ((64, 256), (10, 81)):
        scheduler = make_scheduler(num_blocks=num_blocks)
        request = make_request("a", 20, None)
        assert scheduler.add(request)
        finish_all(scheduler)
        assert len(request.token_ids) == total
        assert request.finish_reason is FinishReason.LENGTH


def test_max_tokens_beyond_the_model_is_clipped() -> None:
    scheduler = make_scheduler(max_model_len=30)
    request = make_request("a", 20, 64)
    assert scheduler.add(request)
    finish_all(scheduler)
    assert len(request.token_ids) == 30


def test_a_full_queue_refuses_until_it_has_room() -> None:
    scheduler = make_scheduler(max_num_queued_reqs=2, max_num_seqs=1)
    assert scheduler.add(make_request("a"))
    assert scheduler.add(make_request("b"))
    refused = make_request("c")
    assert not scheduler.add(refused)
    assert refused.refusal is not None
    assert "max_num_queued_reqs=2" in refused.refusal
    step(scheduler)  # takes one from the queue
    assert scheduler.add(make_request("d"))
    assert finish_all(scheduler) == ["a", "b", "d"]


def test_an_id_in_use_is_refused_and_its_owner_unharmed() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    second = make_request("a")
    assert not scheduler.add(second)
    assert second.refusal is not None
    assert "'a' is in use" in second.refusal
    assert finish_all(scheduler) == ["a"]
    assert scheduler.add(make_request("a"))
