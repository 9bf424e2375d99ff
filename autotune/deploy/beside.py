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
    slo = run.get("slo")
    if slo:
        options += ["--slo", str(slo)]
    lines = [
        "#!/bin/sh",
        *comment(
            "The load that the configuration was tuned under, offered to the server. Run it where "
            "the run was started: a trace is named as it was there."
        ),
        *([] if capacity is None else comment(f"Measured before: {capacity.basis}")),
        *comment("URL and MODEL may be set; API_KEY too, if the server wants one."),
    ]
    if other := _with_vllm(run, evidence):
        lines += comment("Without autotune, with random prompts of the same mean lengths:")
        lines.append(f"#   {other}")
    lines += [
        "set -eu",
        f"URL=${{URL:-{url}}}",
        f"MODEL=${{MODEL:-{_default(served_model)}}}",
        'if [ -n "${API_KEY:-}" ]; then set -- --api-key-env API_KEY "$@"; fi',
        'exec autotune bench --url "$URL" --served-model "$MODEL" \\',
        f'  {shlex.join(options)} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _traffic_options(run: Mapping[str, Any], evidence: Evidence) -> list[str]:
    traffic = (run.get("options") or {}).get("traffic") or {}
    source = traffic.get("source") or (run.get("workload") or {}).get("source") or "chat"
    options = ["--workload", str(source).removeprefix("preset ")]
    if traffic.get("format"):
        options += ["--workload-format", str(traffic["format"])]
    rate = evidence.bench.get("capacity_requests_per_s") or evidence.bench.get("offered_rate")
    rate = rate or (run.get("workload") or {}).get("rate")
    if isinstance(rate, (int, float)) and rate > 0:
        options += ["--rate", "inf" if math.isinf(rate) else f"{rate:.4g}"]
    if traffic.get("length_factor"):
        options += ["--scale-lengths", f"{traffic['length_factor']:g}"]
    if traffic.get("start_s"):
        options += ["--start", f"{traffic['start_s']:g}s"]
    if traffic.get("burstiness") not in (None, 1.0):
        options += ["--burstiness", f"{traffic['burstiness']:g}"]
    if traffic.get("keep_grid"):
        options.append("--keep-grid")
    return [*options, "--duration", "60s"]


def _with_vllm(run: Mapping[str, Any], evidence: Evidence) -> str | None:
    workload = run.get("workload") or {}
    prompt, answer = ((workload.get(f"{side}_tokens") or {}).get("mean") for side in _SIDES)
    rate = evidence.bench.get("offered_rate") or workload.get("rate")
    if not prompt or not answer or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        return None
    return (
        'vllm bench serve --base-url "$URL" --model "$MODEL" --dataset-name random '
        f"--random-input-len {max(1, round(prompt))} "
        f"--random-output-len {max(1, round(answer))} "
        f"--num-prompts {max(1, round(rate * 60))} --request-rate {rate:.4g}"
    )


def _default(name: str) -> str:
    """A model's name inside `${MODEL:-...}` between no quotes."""
    return name if shlex.quote(name) == name else shlex.quote(name)
