"""`autotune bench --url`: what is shown, kept and refused, and the exit codes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner, Result

from autotune.cli.main import app
from autotune.records import RunFolder
from reports.report import render_report
from tests.autotune.load.fake_server import FakeServer, serving

SHORT = ("--rate", "50", "--duration", "0.4s", "--scale-lengths", "0.02")


def bench(server: FakeServer, *arguments: str, env: dict[str, str] | None = None) -> Result:
    with serving(server):
        return CliRunner().invoke(app, ["bench", "--url", server.url, *arguments], env=env)


def vllm_metrics(server: FakeServer) -> str:
    """Counters that grow with the requests that came."""
    count = len(server.asked)
    tokens = sum(body["max_tokens"] for body in server.asked)
    return "\n".join(
        [
            "# TYPE vllm:generation_tokens counter",
            f'vllm:generation_tokens_total{{model_name="fake"}} {tokens}',
            "# TYPE vllm:request_success counter",
            f'vllm:request_success_total{{finished_reason="length"}} {count}',
            "# TYPE vllm:num_preemptions counter",
            f"vllm:num_preemptions_total {2 * count}",
            "# TYPE vllm:num_requests_running gauge",
            "vllm:num_requests_running 3",
            "# TYPE vllm:kv_cache_usage_perc gauge",
            "vllm:kv_cache_usage_perc 0.25",
            "# TYPE vllm:cache_config_info gauge",
            'vllm:cache_config_info{num_gpu_blocks="100",block_size="16"} 1',
            "# TYPE vllm:spec_decode_num_drafts counter",
            f"vllm:spec_decode_num_drafts_total {10 * count}",
            "# TYPE vllm:spec_decode_num_draft_tokens counter",
            f"vllm:spec_decode_num_draft_tokens_total {20 * count}",
            "# TYPE vllm:spec_decode_num_accepted_tokens counter",
            f"vllm:spec_decode_num_accepted_tokens_total {12 * count}",
            "# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter",
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {8 * count}',
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="1"}} {4 * count}',
            "",
        ]
    )


def test_a_bench_of_a_server_has_the_keys_of_one_in_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    server = FakeServer(metrics=vllm_metrics, key="secret")
    done = bench(
        server,
        *SHORT,
        *("--slo", "ttft<5s", "--json", "-o", str(out), "--api-key-env", "SERVER_KEY"),
        env={"SERVER_KEY": "secret"},
    )
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)
    assert {"ttft", "tpot", "itl", "e2e", "output_tokens_per_s", "slo_attainment"} <= set(metrics)
    assert metrics["completed"] == 20
    assert metrics["load_delivered"] in (True, False)
    assert metrics["config"]["url"] == server.url
    engine = metrics["engine"]
    assert engine["preemptions"] == 40  # of the load alone, without what came before
    assert engine["kv_blocks_total"] == 100
    assert engine["kv_peak_usage"] == 0.25
    assert engine["mean_batch"] == 3
    speculation = metrics["speculation"]
    assert speculation["acceptance_rate"] == pytest.approx(0.6)
    assert [p["share"]["value"] for p in speculation["positions"]] == pytest.approx([0.8, 0.4])
    folder = RunFolder(out)
    assert len(folder.read_requests(0)) == 20
    run = folder.read_run()
    assert run["kind"] == "bench"
    assert run["server"]["served_model"] == "fake"
    assert render_report(out).exists()
    assert "secret" not in "".join(p.read_text() for p in out.glob("*.json")) + done.output
    # Nothing of the warm-up is asked again, and the load is told apart from earlier ones.
    prompts = [tuple(body["prompt"]) for body in server.asked]
    assert len(set(prompts)) == len(prompts)
    assert len({body.get("cache_salt") for body in server.asked[-20:]}) == 1


def test_the_rate_is_found_by_a_calibration() -> None:
    done = bench(FakeServer(), "--duration", "0.2s", "--scale-lengths", "0.02", "--slo", "ttft<9s")
    assert "that the server sustained with all requests offered at once" in done.stderr
    assert "within the SLO" in done.stdout


def test_a_missed_slo_ends_with_4() -> None:
    done = bench(FakeServer(gap_s=0.02), *SHORT, "--slo", "ttft<1us")
    assert done.exit_code == 4
    assert "missed by" in done.stdout


def test_a_server_that_dies_in_the_middle_ends_with_3_and_what_was_measured() -> None:
    async def mortal(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        if len(server.asked) > 15:
            server.models = "<html>gone</html>"
            server.key = "changed"
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(0)
            raise ConnectionError
        return await server.stream(request, body)

    done = bench(FakeServer(behaviour=mortal), *SHORT)
    assert done.exit_code == 3, done.output
    assert "stopped answering during the load" in done.stderr
    assert "10 completed, 10 not" in done.stdout
    assert "Traceback" not in done.output


def test_prefixes_of_an_earlier_load_are_noticed() -> None:
    done = bench(FakeServer(cached_tokens=9), *SHORT, "--workload", "summarize")
    assert "in its prefix cache" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--url", "nonsense"), 2, "not the address of a server"),
        (("--url", "http://127.0.0.1:1"), 3, "cannot be reached"),
        (("--url", "http://h", "--max-num-seqs", "4"), 2, "--max-num-seqs has no effect"),
        (("--url", "http://h", "--api-key-env", "NO_SUCH_VARIABLE"), 2, "NO_SUCH_VARIABLE"),
        (("--url", "http://h", "--slo", "quality_loss<1%"), 2, "cannot be measured over HTTP"),
        (("--url", "http://h", "--tokenizer", "/no/such"), 2, "/no/such"),
        (("--served-model", "x"), 2, "--served-model needs --url"),
        (("--send", "text"), 2, "--send needs --url"),
        (("--url", "http://h", "--send", "letters"), 2, "letters"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_context_beyond_the_servers_is_refused() -> None:
    done = bench(FakeServer(), *SHORT, "--max-model-len", "1000")
    assert done.exit_code == 2
    assert "above the 512 that the server tells" in done.stderr
