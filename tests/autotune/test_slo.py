import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autotune.errors import BadInput
from autotune.records import RequestRecord
from autotune.slo import UNMEASURED_VIOLATION, Limit, Slo, SloError, parse_slo, statistic_of


def record(*times: float, outcome: str = "finished", intended: float = 0.0) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        intended_send=intended,
        send=intended,
        token_times=times,
        input_tokens=8,
        output_tokens=len(times),
        asked_output_tokens=len(times),
        outcome=outcome,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("text", "metric", "statistic", "operator", "bound"),
    [
        ("ttft<200ms", "ttft", "p95", "<", 0.2),
        ("tpot<=100 ms", "tpot", "p95", "<=", 0.1),
        ("p99(ttft)<200ms", "ttft", "p99", "<", 0.2),
        ("p99.9 ( itl ) < 1500us", "itl", "p99.9", "<", 0.0015),
        ("p099.90(itl)<1s", "itl", "p99.9", "<", 1.0),
        ("mean(e2e)<3s", "e2e", "mean", "<", 3.0),
        ("e2e<1.5s", "e2e", "p95", "<", 1.5),
        ("error_rate<1%", "error_rate", None, "<", 0.01),
        ("error_rate<=0", "error_rate", None, "<=", 0.0),
        ("error_rate<0.02", "error_rate", None, "<", 0.02),
        ("goodput>=0.99", "goodput", None, ">=", 0.99),
        ("goodput>=100%", "goodput", None, ">=", 1.0),
        ("throughput > 500 tok/s", "throughput", None, ">", 500.0),
        ("quality_loss<1%", "quality_loss", None, "<", 0.01),
        ("kl<2e-2", "kl", None, "<", 0.02),
    ],
)
def test_limit(text: str, metric: str, statistic: str, operator: str, bound: float) -> None:
    (limit,) = parse_slo(text).limits
    assert (limit.metric, limit.statistic, limit.operator, limit.bound) == (
        metric,
        statistic,
        operator,
        bound,
    )
    assert limit.text == "".join(text.split())


def test_several_limits_keep_their_order_and_their_text() -> None:
    slo = parse_slo("  ttft < 200ms ,\n\tp50(ttft)<100ms,tpot<100ms ")
    assert str(slo) == "ttft<200ms,p50(ttft)<100ms,tpot<100ms"
    assert [limit.metric for limit in slo.limits] == ["ttft", "ttft", "tpot"]
    assert parse_slo(str(slo)) == slo


@pytest.mark.parametrize(
    ("text", "position", "told"),
    [
        ("", 0, "ttft, tpot, itl, e2e"),
        ("   ", 3, "ttft, tpot"),
        ("ttft<200", 8, "us, ms or s"),
        ("ttft<200 ,tpot<1s", 9, "us, ms or s"),
        ("ttft<200min", 8, "us, ms or s"),
        ("ttft<200ms;tpot<100ms", 10, "a comma, or the end"),
        ("ttft<200ms,", 11, "ttft, tpot"),
        ("ttft<200ms,,tpot<1s", 11, "ttft, tpot"),
        ("ttft>200ms", 4, "< or <="),
        ("ttft=200ms", 4, "< or <="),
        ("ttft≤200ms", 4, "< or <="),
        ("goodput<0.9", 7, "> or >="),
        ("goodput>=2", 9, "a share above 0"),
        ("goodput>1", 8, "a share above 0"),
        ("goodput>=0", 9, "a share above 0"),
        ("error_rate<1", 11, "1% or 0.01"),
        ("error_rate<0", 11, "a number above 0"),
        ("ttft<=0ms", 6, "a number above 0"),
        ("ttft<-5ms", 5, "a number such as"),
        ("ttft<ms", 5, "a number such as"),
        ("ttft 200ms", 5, "< or <="),
        ("ttft<1e999s", 5, "a smaller number"),
        ("ttft<1e-999s", 5, "a number above 0"),
        ("TTFT<200ms", 0, "ttft"),
        ("latency<200ms", 0, "ttft"),
        ("p95<200ms", 0, "p95(ttft)"),
        ("p100(ttft)<1s", 0, "below 100"),
        ("p0(ttft)<1s", 0, "below 100"),
        ("p99.99999999999999999999(ttft)<1s", 0, "below 100"),
        ("max(ttft)<1s", 0, "mean, or p"),
        ("p95(goodput)>=0.9", 4, "ttft, tpot, itl, e2e"),
        ("p95()<1s", 4, "ttft, tpot"),
        ("p95(ttft<1s", 8, ")"),
        ("throughput>500", 14, "tok/s"),
        ("throughput>500tok", 14, "tok/s"),
        ("throughput>500req/s", 14, "tok/s"),
        ("kl<2%", 4, "nothing"),
        ("ttft<200ms,ttft<=300ms", 11, "one limit"),
        ("ttft<200ms, p95(ttft)<300ms", 12, "one limit"),
        ("goodput>=0.9,goodput>=0.8", 13, "one limit"),
        ("ttft<٣s", 5, "a number such as"),
    ],
)
def test_error_points_at_the_character(text: str, position: int, told: str) -> None:
    with pytest.raises(SloError) as caught:
        parse_slo(text)
    error = caught.value
    sentence, shown, caret, allowed = str(error).split("\n")
    assert error.position == position
    assert shown[2:] in sentence
    assert caret == "  " + " " * position + "^"
    assert told in allowed
    assert isinstance(error, BadInput)
    assert error.exit_code == 2


def test_caret_stands_under_the_character_of_a_long_or_strange_text() -> None:
    text = "ttft<200ms," * 40 + "tpot!1s"
    with pytest.raises(SloError) as caught:
        parse_slo(
            "p1(ttft)<1s,p2(ttft)<1s," + ",".join(f"p{n}(e2e)<1s" for n in range(1, 60)) + "!"
        )
    _, shown, caret, _ = str(caught.value).split("\n")
    assert len(shown) < 140
    assert shown[caret.index("^")] == "!"
    with pytest.raises(SloError, match="limited twice"):
        parse_slo(text)
    with pytest.raises(SloError) as caught:
        parse_slo("ttft\n<\x00")
    assert str(caught.value).split("\n")[1] == "  ttft <?"


_latency = st.sampled_from(["ttft", "tpot", "itl", "e2e"])
_space = st.sampled_from(["", " ", "\t", " \n"])
_positive = st.one_of(
    st.integers(1, 10**6).map(str),
    st.floats(1e-3, 1e6).map(repr),
)
_statistic = st.one_of(
    st.none(),
    st.just("mean"),
    st.decimals(min_value="0.01", max_value="99.99", places=2).map(lambda d: f"p{d}"),
)


@st.composite
def _limit_text(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["time", "share", "goodput", "throughput", "kl"]))
    if kind == "time":
        metric, statistic = draw(_latency), draw(_statistic)
        tokens = [statistic, "(", metric, ")"] if statistic else [metric]
        tokens += [draw(st.sampled_from(["<", "<="])), draw(_positive)]
        tokens += [draw(st.sampled_from(["us", "ms", "s"]))]
    elif kind == "share":
        tokens = [draw(st.sampled_from(["error_rate", "quality_loss"])), "<"]
        tokens += [str(draw(st.integers(1, 99))), "%"]
    elif kind == "goodput":
        tokens = ["goodput", ">=", repr(draw(st.floats(0.001, 1.0)))]
    elif kind == "throughput":
        tokens = ["throughput", draw(st.sampled_from([">", ">="])), draw(_positive), "tok/s"]
    else:
        tokens = ["kl", "<=", draw(_positive)]
    return "".join(draw(_space) + token for token in tokens) + draw(_space)


@settings(deadline=None)
@given(st.lists(_limit_text(), min_size=1, max_size=6))
def test_round_trip(texts: list[str]) -> None:
    limits = {}
    for text in texts:
        (limit,) = parse_slo(text).limits
        limits[limit.metric, limit.statistic] = (limit, text)
    slo = parse_slo(",".join(text for _, text in limits.values()))
    assert slo.limits == tuple(limit for limit, _ in limits.values())
    assert parse_slo(str(slo)) == slo
    for limit in slo.limits:
        assert 0 < limit.bound < math.inf


_alphabet = "ttpofe2itl_errorgdput<>=()0123456789.%,smu -+e/\n\x00é漢p95"


@settings(deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=_alphabet, max_size=40)))
@example("ttft<" + "9" * 5000 + "ms")
@example("p" + "9" * 5000 + "(ttft)<1s")
@example("ttft<1e" + "9" * 400 + "s")
@example("ttft<1e-" + "9" * 400 + "s")
@example("\ud800")
def test_junk_raises_nothing_but_slo_error(text: str) -> None:
    try:
        slo = parse_slo(text)
    except SloError as error:
        position = error.position
    else:
        assert parse_slo(str(slo)) == slo
        position = 0
    assert 0 <= position <= len(text)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 99.99))
def test_statistic_agrees_with_numpy(values: list[float], percent: float) -> None:
    got = statistic_of(values, f"p{percent!r}" if "e" not in repr(percent) else "p1")
    want = np.percentile(values, percent if "e" not in repr(percent) else 1.0)
    assert got == pytest.approx(float(want), rel=1e-12, abs=1e-12)


def test_statistic_with_requests_that_never_finished() -> None:
    assert statistic_of([1.0, 2.0, 3.0, math.inf], "p50") == 2.5
    assert statistic_of([1.0, math.inf, math.inf], "p50") == math.inf
    # Rank 0.95 * 20 = 19 is the last finite one of 21; with 20 of 20 the interpolation needs inf.
    assert statistic_of([*range(20), math.inf], "p95") == 19
    assert statistic_of([*range(19), math.inf], "p95") == math.inf
    assert statistic_of([], "p95") is None
    assert statistic_of([1.0, math.inf], "mean") == math.inf


def test_evaluate() -> None:
    slo = parse_slo("ttft<200ms,mean(e2e)<=3s,error_rate<1%,goodput>=0.9,throughput>100tok/s")
    metrics = {
        "ttft": {"p95": 0.3},
        "e2e": {"mean": 3.0},
        "error_rate": 0.0,
        "slo_attainment": 0.45,
        "output_tokens_per_s": 150.0,
        "completed": 9,
    }
    ttft, e2e, errors, goodput, throughput = slo.evaluate(metrics)
    assert (ttft.limit, ttft.measured, ttft.bound, ttft.met) == ("ttft<200ms", 0.3, 0.2, False)
    assert ttft.violation == pytest.approx(0.5)
    assert (e2e.met, e2e.violation) == (True, 0.0)
    assert (errors.met, errors.violation) == (True, -1.0)
    assert not goodput.met
    assert goodput.violation == pytest.approx(0.5)
    assert throughput.met
    assert throughput.violation == pytest.approx(-0.5)


def test_a_strict_limit_is_not_met_by_equality() -> None:
    for text, value in [("ttft<200ms", 0.2), ("ttft<=200ms", 0.2)]:
        (result,) = parse_slo(text).evaluate({"ttft": {"p95": value}, "completed": 1})
        assert result.met == ("=" in text)
        assert (result.violation > 0) == (not result.met)


def test_bound_of_zero() -> None:
    slo = parse_slo("error_rate<=0%")
    assert slo.evaluate({"error_rate": 0.0})[0].met
    (missed,) = slo.evaluate({"error_rate": 0.25})
    assert (missed.met, missed.violation) == (False, 0.25)


def test_what_was_not_measured_is_violated() -> None:
    slo = parse_slo("ttft<1s,throughput>1tok/s,kl<0.1")
    nothing = slo.evaluate({"ttft": {"p95": None}, "completed": 0, "timed_out": 4})
    some = slo.evaluate({"ttft": {"p95": None}, "completed": 3, "timed_out": 1})
    assert all(not r.met and r.measured is None for r in nothing + some)
    assert all(r.violation >= UNMEASURED_VIOLATION for r in nothing + some)
    assert all(math.isfinite(r.violation) for r in nothing)
    assert all(n.violation > s.violation for n, s in zip(nothing, some, strict=True))
    assert [r.met for r in slo.evaluate({})] == [False, False, False]


def test_statistics_that_count_misses_go_first() -> None:
    slo = parse_slo("ttft<1s")
    over_finished = {"ttft": {"p95": 0.5}, "completed": 5, "failed": 5}
    assert slo.evaluate(over_finished)[0].met
    counted = {**over_finished, "slo_statistics": {"p95(ttft)": None}}
    assert not slo.evaluate(counted)[0].met


def test_tpot_of_single_tokens_is_met() -> None:
    slo = parse_slo("tpot<1ms,itl<1ms")
    one_token = {"tpot": {"p95": None}, "itl": {"p95": None}, "completed": 3}
    assert all(r.met and r.violation == 0 for r in slo.evaluate(one_token))
    assert not any(r.met for r in slo.evaluate({**one_token, "timed_out": 1}))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("ttft<1.1s", True),
        ("ttft<1s", False),
        ("ttft<=1s", True),
        ("p50(ttft)<0.9s", False),
        ("tpot<1.01s", True),
        ("tpot<=0.99s", False),
        ("e2e<4.01s", True),
        ("e2e<4s", False),
        # The gaps are 0.5, 0.5 and 2 s.
        ("p50(itl)<=0.5s", True),
        ("mean(itl)<=1s", True),
        ("itl<=1.84s", False),
        ("itl<=1.86s", True),
        ("error_rate<1%,goodput>=0.99,throughput>1000tok/s,kl<1e-9", True),
    ],
)
def test_request_meets(text: str, good: bool) -> None:
    assert parse_slo(text).request_meets(record(2.0, 2.5, 3.0, 5.0, intended=1.0)) is good


def test_request_meets_at_the_edges() -> None:
    slo = parse_slo("ttft<2s,tpot<1ms,itl<1ms")
    assert slo.request_meets(record(1.0))
    for outcome in ("refused", "timed_out", "failed"):
        assert not slo.request_meets(record(1.0, outcome=outcome))
        assert not Slo().request_meets(record(1.0, outcome=outcome))
    assert Slo().request_meets(record(1.0))


def test_needs_quality() -> None:
    assert parse_slo("ttft<1s,kl<0.1").needs_quality
    assert parse_slo("quality_loss<1%").needs_quality
    assert not parse_slo("ttft<1s").needs_quality
    assert Limit("kl", None, "<", 0.1, "kl<0.1").per_request is False
