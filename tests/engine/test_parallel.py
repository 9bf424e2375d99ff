"""Ranks as processes: they serve as one engine does, and end when they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine import LLM, EngineConfig, SamplingParams
from engine.errors import ConfigError, EnvironmentLacks, ModelError
from engine.loading import load_model
from engine.parallel import all_or_none
from engine.parallel_driver import DriverRanks, interrupts_wait
from engine.quantize.quality import score_text
from engine.step_record import StepRecord
from tests.engine.rank_threads import on_ranks
from tests.engine.tiny_models import TinyModel, make_tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 4, 3, 2, 1], list(range(40)), [7] * 11]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("gemma2", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole(tiny: TinyModel) -> LLM:
    return tiny.llm()


def ranks_of(llm: LLM) -> DriverRanks:
    ranks = llm._loaded.runner.decoder.ranks
    assert isinstance(ranks, DriverRanks)
    return ranks


def wait_for_end(pids: list[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tokens(llm: LLM, sampling: SamplingParams) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, sampling)]


def test_two_processes_serve_as_one_does_until_one_is_killed(
    tiny: TinyModel, whole: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair of processes, for starting one takes seconds."""
    llm = tiny.llm(tensor_parallel_size=2)
    ranks = ranks_of(llm)
    (pid,) = ranks.workers.pids().values()
    assert tokens(llm, GREEDY) == tokens(whole, GREEDY)
    assert tokens(llm, SEEDED) == tokens(whole, SEEDED)

    steps: list[StepRecord] = []
    for each in (llm, whole):
        each.engine.on_step = steps.append
        tokens(each, GREEDY)
        each.engine.on_step = None
    divided, alone = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    for step in divided:
        assert step.communication_seconds is not None
        assert step.waiting_seconds is not None
        assert 0 < step.communication_seconds < step.device_seconds
        assert 0 <= step.waiting_seconds <= step.communication_seconds
    assert {(step.communication_seconds, step.waiting_seconds) for step in alone} == {(0.0, 0.0)}

    knobs: dict[str, Any] = {"block_size": 8, "max_model_len": 64, "max_num_batched_tokens": 16}
    llm.reconfigure(**knobs, max_num_seqs=2)
    assert tokens(llm, GREEDY) == tokens(whole, GREEDY)
    with pytest.raises(EnvironmentLacks, match="room for a sequence of"):
        llm.reconfigure(kv_cache_memory_bytes=1)
    # All ranks have gone back to the old cache.
    assert tokens(llm, GREEDY) == tokens(whole, GREEDY)

    text = torch.randint(0, 128, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    scores = [score_text(x._loaded.runner.decoder, text, 40, 8) for x in (llm, whole)]
    torch.testing.assert_close(scores[0].nll, scores[1].nll, rtol=0.0, atol=1e-4)

    # A Ctrl-C in the midst of a step takes effect after it: the ranks stay together.
    with monkeypatch.context() as patched:
        pending = [signal.SIGINT]

        def interrupted(x: torch.Tensor) -> torch.Tensor:
            if pending:
                os.kill(os.getpid(), pending.pop())
            return type(ranks).all_reduce(ranks, x)

        patched.setattr(ranks, "all_reduce", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens(llm, GREEDY)
    assert tokens(llm, GREEDY) == tokens(whole, GREEDY)

    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    told = r"rank 1 of 2 \(process \d+\) was killed by SIGKILL"
    with pytest.raises(EnvironmentLacks, match=told):
        tokens(llm, GREEDY)
    assert time.monotonic() - began < 10.0
    assert llm._loaded.failure is not None
    with pytest.raises(EnvironmentLacks, match="rank 1 of 2"):  # and it stays so
        tokens(llm, GREEDY)
    llm.close()
    llm.close()


DRIVER = """
import json, sys, time
from engine import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", max_model_len=64, num_threads=1, tensor_parallel_size=2)
ranks = llm._loaded.runner.decoder.ranks
print(json.dumps([list(ranks.workers.pids().values()), str(ranks._folder)]), flush=True)
while True:
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=20))
"""


def test_the_others_end_when_the_driver_is_killed(tiny: TinyModel) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny.folder)], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert driver.stdout is not None
        pids, folder = json.loads(driver.stdout.readline())
        assert all(map(is_running, pids))
        assert Path(folder).is_dir()
    finally:
        driver.kill()
        driver.communicate()
    wait_for_end(pids)
    assert not Path(folder).exists()


def test_a_rank_that_cannot_load_is_told_as_its_error(tiny: TinyModel, tmp_path: Path) -> None:
    ranks = DriverRanks(2, torch.device("cpu"))
    try:
        config = EngineConfig(model=str(tmp_path / "nowhere"), device="cpu")
        ranks.start(config=config.to_dict(), weights="", device="cpu")
        with pytest.raises(ModelError, match=r"^rank 1 of 2: model folder .*nowhere does not"):
            ranks.meet()
    finally:
        ranks.close()
    wait_for_end(list(ranks.workers.pids().values()), 0.1)


def test_sizes_that_cannot_be_are_refused(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(size: int) -> str:
        with pytest.raises((ConfigError, EnvironmentLacks)) as caught:
            load_model(EngineConfig(model=str(tiny.folder), tensor_parallel_size=size))
        return str(caught.value)

    assert refusal(8) == (
        "tensor_parallel_size=8 does not divide the model's 4 attention heads: choose of 1, 2, 4"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refusal(4) == "tensor_parallel_size=4 needs 4 GPUs, 1 is here"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "needs NCCL" in refusal(4)


def test_memory_that_one_rank_lacks_is_lacking_on_all(tmp_path: Path) -> None:
    def attempt(rank: int) -> int:
        if rank == 1:
            raise EnvironmentLacks("no memory on this one")
        return rank

    def outcome(ranks: Any) -> str:
        with pytest.raises(EnvironmentLacks) as caught:
            all_or_none(ranks, lambda: attempt(ranks.rank))
        assert ranks.minimum(10 - ranks.rank) == 8
        return str(caught.value)

    told = on_ranks(3, tmp_path / "meeting", outcome)
    assert told[1] == "no memory on this one"
    assert told[0] == told[2]
    assert "another rank" in told[0]


@pytest.mark.parametrize(("count", "reached"), [(1, True), (2, False)])
def test_an_interrupt_waits_and_a_second_does_not(count: int, reached: bool) -> None:
    done = []

    def work() -> None:
        with interrupts_wait():
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert bool(done) is reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
