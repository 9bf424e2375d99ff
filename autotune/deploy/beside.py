"""What stands beside every exported configuration: a smoke test and a benchmark, both scripts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.deploy.replica_capacity import replica_capacity
from autotune.deploy.target import Deployment
from autotune.deploy.yaml_text import comment
from autotune.plain_number import plain_number
from autotune.slo import Slo, parse_slo

_SIDES = ("input", "output")
SMOKE_TEST, BENCHMARK = "smoke_test.sh", "benchmark.sh"


def beside(
    deployment: Deployment,
    *,
    served_model: str,
    start: str,
    url: str = "http://127.0.0.1:8000",
    health: str = "/health",
    api: str = "/v1",
    wait_s: int = 900,
) -> dict[str, str]:
    """The two scripts, by file name.

    Arguments:
        deployment: what is deployed.
        served_model: the name under which the server answers.
        start: how the server is started, in words or as a command; for a comment.
        url: where it answers unless the variable URL says otherwise.
        health: the path that answers 200 once it serves.
        api: the path where the OpenAI-compatible routes begin.
        wait_s: how long the smoke test waits for that.
    """
    return {
        SMOKE_TEST: smoke_test(
            served_model, start=start, url=url, health=health, api=api, wait_s=wait_s
        ),
        BENCHMARK: benchmark(
            deployment, served_model=served_model, url=url + api.removesuffix("/v1")
        ),
    }


def smoke_test(
    served_model: str,
    *,
    start: str,
    url: str,
    health: str = "/health",
    api: str = "/v1",
    wait_s: int = 900,
) -> str:
    """A POSIX script that fails unless the server gets healthy, knows the model and completes."""
    lines = [
        "#!/bin/sh",
        *comment(f"Does the server answer? Started by: {start}"),
        *comment("URL, MODEL and WAIT (seconds) may be set; API_KEY too, if the server wants one."),
        "set -eu",
        f"URL=${{URL:-{url}}}",
        f"MODEL=${{MODEL:-{_default(served_model)}}}",
        f"WAIT=${{WAIT:-{wait_s}}}",
        "",
        "ask() {  # the key goes through a pipe, so that no list of processes shows it",
        '  if [ -n "${API_KEY:-}" ]; then',
        '    printf \'header = "Authorization: Bearer %s"\\n\' "$API_KEY" |',
        '      curl --config - --silent --show-error --fail --max-time 120 "$@"',
        "  else",
        '    curl --silent --show-error --fail --max-time 120 "$@"',
        "  fi",
        "}",
        "",
        'fail() { echo "smoke test failed: $1" >&2; exit 1; }',
        "",
        "waited=0",
        f'until curl --silent --fail --max-time 5 --output /dev/null "$URL{health}"; do',
        f'  [ "$waited" -lt "$WAIT" ] || fail "$URL{health} does not answer after $WAIT s"',
        "  sleep 1",
        "  waited=$((waited + 1))",
        "done",
        f'ask "$URL{api}/models" | grep --fixed-strings --quiet "\\"$MODEL\\"" ||',
        f'  fail "{api}/models does not name $MODEL"',
        r'body="{\"model\": \"$MODEL\", \"prompt\": \"Once upon a time\", \"max_tokens\": 8}"',
        f'answer=$(ask "$URL{api}/completions" --header "Content-Type: application/json" \\',
        '  --data "$body") || fail "no completion"',
        'printf %s "$answer" | grep --quiet \'"completion_tokens": *[1-9]\' ||',
        '  fail "a completion without tokens: $answer"',
        'echo "smoke test passed: $MODEL at $URL"',
    ]
    return "\n".join(lines) + "\n"


def benchmark(deployment: Deployment, *, served_model: str, url: str) -> str:
    """A script that offers the load of the run to the deployed server."""
    run, evidence = deployment.run, deployment.evidence
    capacity = replica_capacity(evidence)
    options = _traffic_options(run, evidence)
    slo = parse_slo(str(run["slo"])) if run.get("slo") else Slo()
    over_http = Slo(tuple(limit for limit in slo.limits if limit not in slo.guard.limits))
    if over_http.limits:
        options += ["--slo", str(over_http)]
    lines = [
        "#!/bin/sh",
        *comment(
            "The load that the configuration was tuned under, offered to the server. Run it where "
            "the run was started: a trace is named as it was there."
        ),
        *([] if capacity is None else comment(f"Measured before: {capacity.basis}")),
        *(comment(f"Not measured over HTTP: {slo.guard}") if slo.needs_quality else []),
        *comment(
            "URL, MODEL and AUTOTUNE (the program) may be set; API_KEY too, if the server wants "
            "one."
        ),
    ]
    if other := _with_vllm(run, evidence):
        lines += comment("Without autotune, with random prompts of the same mean lengths:")
        lines.append(f"#   {other}")
    lines += [
        "set -eu",
        f"URL=${{URL:-{url}}}",
        f"MODEL=${{MODEL:-{_default(served_model)}}}",
        'if [ -n "${API_KEY:-}" ]; then set -- --api-key-env API_KEY "$@"; fi',
        'exec "${AUTOTUNE:-autotune}" bench --url "$URL" --served-model "$MODEL" \\',
        f'  {shlex.join(options)} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _traffic_options(run: Mapping[str, Any], evidence: Evidence) -> list[str]:
    traffic = (run.get("options") or {}).get("traffic") or {}
    workload = run.get("workload") or {}
    scaling = workload.get("scaling") or {}
    source = traffic.get("source") or workload.get("source") or "chat"
    options = ["--workload", str(source).removeprefix("preset ")]
    if traffic.get("format"):
        options += ["--workload-format", str(traffic["format"])]
    if (rate := _asked_rate(run, evidence)) is not None:
        options += ["--rate", plain_number(rate, 4)]
    # A preset's lengths were scaled to the measured model's context, which a server may not tell.
    factor = traffic.get("length_factor") or scaling.get("lengths")
    if factor:
        options += ["--scale-lengths", f"{factor:g}"]
    if traffic.get("start_s"):
        options += ["--start", f"{traffic['start_s']:g}s"]
    if traffic.get("burstiness") not in (None, 1.0):
        options += ["--burstiness", f"{traffic['burstiness']:g}"]
    if traffic.get("keep_grid"):
        options.append("--keep-grid")
    return [*options, "--duration", "60s"]


def _asked_rate(run: Mapping[str, Any], evidence: Evidence) -> float | None:
    """The mean rate that the whole workload was scaled to, which is what `--rate` asks for.

    The windows that were measured had more or fewer arrivals, as a trace has busy minutes.
    """
    workload, traffic = run.get("workload") or {}, (run.get("options") or {}).get("traffic") or {}
    asked = _rate((workload.get("scaling") or {}).get("rate")) or _rate(traffic.get("rate"))
    seen = _rate(workload.get("rate"))
    found = _rate(evidence.bench.get("capacity_requests_per_s"))
    if found is None:
        return asked or _seen_rate(run, evidence)
    if asked is None or seen is None or math.isinf(asked):
        return found
    return found * asked / seen


def _seen_rate(run: Mapping[str, Any], evidence: Evidence) -> float | None:
    """Arrivals per second as they were measured."""
    bench = evidence.bench
    found = _rate(bench.get("capacity_requests_per_s")) or _rate(bench.get("offered_rate"))
    return found or _rate((run.get("workload") or {}).get("rate"))


def _rate(value: Any) -> float | None:
    """A rate above 0, of a number or of the text for infinity; None for all else."""
    try:
        rate = float(value)
    except (TypeError, ValueError):
        return None
    return rate if rate > 0 else None


def _with_vllm(run: Mapping[str, Any], evidence: Evidence) -> str | None:
    workload = run.get("workload") or {}
    prompt, answer = ((workload.get(f"{side}_tokens") or {}).get("mean") for side in _SIDES)
    rate = _seen_rate(run, evidence)
    if not prompt or not answer or rate is None or math.isinf(rate):
        return None
    return (
        'vllm bench serve --base-url "$URL" --model "$MODEL" --dataset-name random '
        f"--random-input-len {max(1, round(prompt))} "
        f"--random-output-len {max(1, round(answer))} "
        f"--num-prompts {max(1, round(rate * 60))} --request-rate {plain_number(rate, 4)}"
    )


def _default(name: str) -> str:
    """A model's name inside `${MODEL:-...}` between no quotes."""
    return name if shlex.quote(name) == name else shlex.quote(name)
