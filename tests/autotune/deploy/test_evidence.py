from autotune.deploy.evidence import Evidence


def test_a_gain_is_told_with_its_interval_and_not_where_the_default_was_kept() -> None:
    trials = {"winner_trials": [3, 5], "baseline_trials": [2, 4]}
    gain = {"value": 1.5, "low": 1.2, "high": 1.9, "confidence": 0.95}
    (line,) = Evidence.from_run({"result": {"gain": gain, **trials}}).summary
    assert line == (
        "Gain over the default: 1.5x, 95% interval 1.2x to 1.9x, trials 3, 5 against trials 2, 4 "
        "of the default"
    )
    kept = {"value": 1.0, "low": 1.0, "high": 1.0, "confidence": 0.0}
    assert Evidence.from_run({"result": {"gain": kept, **trials}}).summary == ()
