"""A thread steps the engine, and each stream gets its own: whoever leaves, fails or comes late."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from engine.errors import EngineError, RequestRefused
from engine.request import FinishReason, SamplingParams
from engine.server.async_engine import AsyncEngine
from engine.server.health import health
from engine.server.limits import ServerLimits
from engine.server.refusals import Draining, EngineFailed, Overloaded, TimedOut
from engine.server.stream import Stream
from tests.engine.fake_executor import VOCABULARY, expected_output, greedy
from tests.engine.server.fake_served import Gate, gated_engine, some_prompt, until_idle

Test = Callable[[AsyncEngine, Gate], Coroutine[Any, Any, None]]


def run(
    test: Test,
    *,
    limits: ServerLimits | None = None,
    failure: Callable[[], EngineError | None] = lambda: None,
    **knobs: Any,
) -> AsyncEngine:
    async def main() -> AsyncEngine:
        engine, gate = gated_engine(**knobs)
        served = AsyncEngine(engine, limits=limits or ServerLimits(), failure=failure)
        try:
            async with asyncio.timeout(60):
                await test(served, gate)
        finally:
            gate.open.set()
            served.close()
        assert not served.stepping
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, "a task is left"
        return served

    return asyncio.run(main())


async def tokens_of(stream: Stream) -> list[int]:
    tokens: list[int] = []
    async for output in stream:
        tokens += output.token_ids
    return tokens


async def entered(gate: Gate) -> None:
    """Wait until a step stands at the shut gate."""
    while not gate.entered.is_set():
        await asyncio.sleep(0.001)


def test_each_stream_gets_its_own_tokens() -> None:
    async def test(served: AsyncEngine, _gate: Gate) -> None:
        chance = random.Random(1)
        prompts = [some_prompt(chance) for _ in range(50)]
        streams = [served.submit(prompt, greedy(10)) for prompt in prompts]
        for prompt, tokens in zip(
            prompts, await asyncio.gather(*map(tokens_of, streams)), strict=True
        ):
            assert tokens == expected_output(prompt, 10)
        await until_idle(served)

    run(test, max_num_seqs=16, max_num_batched_tokens=64)


def test_a_thousand_streams_of_whom_many_leave() -> None:
    """Readers end, break off, are cancelled or never come; nothing of them stays."""

    async def read(stream: Stream, prompt: list[int], length: int, chance: random.Random) -> None:
        fate = chance.random()
        most = chance.randint(0, length)
        if fate < 0.2:  # before the first token
            stream.abort()
            assert await tokens_of(stream) == []
            return
        tokens: list[int] = []
        try:
            async for output in stream:
                tokens += output.token_ids
                if fate < 0.5 and len(tokens) >= most:
                    break
                if fate > 0.9:
                    await asyncio.sleep(chance.random() * 0.01)
        finally:
            stream.abort()
        expected = expected_output(prompt, length)
        assert tokens == expected[: len(tokens)]
        if fate >= 0.5:
            assert len(tokens) == length

    async def test(served: AsyncEngine, _gate: Gate) -> None:
        chance = random.Random(2)
        tasks: list[asyncio.Task[None]] = []
        for _ in range(1000):
            prompt, length = some_prompt(chance), chance.randint(1, 20)
            stream = served.submit(prompt, greedy(length))
            tasks.append(asyncio.create_task(read(stream, prompt, length, chance)))
            if chance.random() < 0.1:
                await asyncio.sleep(0)
            if chance.random() < 0.1:
                chance.choice(tasks).cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [e for e in ended if e and not isinstance(e, asyncio.CancelledError)]
        assert wrong == []
        await until_idle(served)
        assert sum(served.metrics.finished.values()) == 1000

    run(test, num_blocks=96, max_num_seqs=32, max_num_batched_tokens=128)


def test_a_reader_who_comes_late_gets_one_output() -> None:
    async def test(served: AsyncEngine, _gate: Gate) -> None:
        stream = served.submit([1, 2, 3], greedy(12))
        await until_idle(served)
        output = await anext(stream)
        assert output.token_ids == expected_output([1, 2, 3], 12)
        assert output.finish_reason is FinishReason.LENGTH
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(test)


def test_an_abort_is_seen_by_the_next_step() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        stream = served.submit([1, 2, 3], greedy(200))
        await entered(gate)
        stream.abort()
        stream.abort()
        gate.open.set()
        await until_idle(served)
        assert served.metrics.finished["abort"] == 1
        assert served.metrics.generated_tokens <= 2

    run(test)


def test_a_failed_step_takes_only_its_own_requests() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        gate.errors.append(MemoryError("no room"))
        lost = served.submit([1], greedy(5))
        await entered(gate)
        saved = served.submit([2], greedy(5))
        gate.open.set()
        with pytest.raises(EngineFailed, match="no room"):
            await tokens_of(lost)
        assert await tokens_of(saved) == expected_output([2], 5)
        assert await tokens_of(served.submit([3], greedy(5))) == expected_output([3], 5)
        assert health(served)[0] == 200
        assert served.metrics.finished["error"] == 1

    run(test)


def test_failed_steps_with_good_ones_between_do_not_end_the_engine() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        for _ in range(6):
            gate.errors.append(RuntimeError("once"))
            with pytest.raises(EngineFailed):
                await tokens_of(served.submit([1], greedy(5)))
            assert await tokens_of(served.submit([1], greedy(2))) == expected_output([1], 2)

    run(test)


@pytest.mark.parametrize("told", [True, False], ids=["the model says so", "step after step"])
def test_an_engine_that_cannot_go_on(told: bool) -> None:
    """Every stream raises, new requests too, and health tells."""
    broken = EngineError("a rank has ended") if told else None

    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        gate.errors += [RuntimeError("device lost")] * (1 if told else 3)
        streams = [served.submit([i], greedy(50)) for i in range(9)]  # 4 run, 5 wait
        await entered(gate)
        gate.open.set()
        for stream in streams:
            with pytest.raises(EngineFailed, match="device lost"):
                await tokens_of(stream)
        while served.failed is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        with pytest.raises(EngineFailed, match="device lost"):
            served.submit([1], greedy())
        status, said = health(served)
        assert (status, said.status) == (503, "failed")
        assert served.num_unfinished == 0
        assert await served.drain(5)

    run(test, failure=lambda: broken, max_num_seqs=4)


def test_whatever_kills_the_thread_is_told() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.errors.append(SystemExit("gone"))
        with pytest.raises(EngineFailed, match="gone"):
            await tokens_of(served.submit([1], greedy()))
        while served.stepping:
            await asyncio.sleep(0.001)

    run(test)


def test_health_fails_while_a_step_does_not_end() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        assert served.stalled_for() == 0.0
        gate.open.clear()
        stream = served.submit([1], greedy(3))
        while health(served)[0] == 200:
            await asyncio.sleep(0.005)
        status, said = health(served)
        assert (status, said.status) == (503, "stalled")
        assert served.stalled_for() > 0.05
        gate.open.set()
        assert len(await tokens_of(stream)) == 3
        assert health(served)[0] == 200
        assert served.stalled_for() == 0.0

    run(test, limits=ServerLimits(stall_s=0.05))


def test_waiting_for_a_full_batch_is_no_stall() -> None:
    async def test(served: AsyncEngine, _gate: Gate) -> None:
        served.engine.clock = asyncio.get_running_loop().time
        stream = served.submit([1], greedy(3))
        await asyncio.sleep(0.15)
        assert served.engine.has_unfinished
        assert health(served)[0] == 200
        assert len(await tokens_of(stream)) == 3

    limits = ServerLimits(stall_s=0.05)
    run(test, limits=limits, batching_mode="dynamic", max_queue_delay=0.2)


def test_a_full_queue_says_when_to_come_back() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        for _ in range(8):  # so that the rate is known
            await tokens_of(served.submit([1], greedy(1)))
        gate.open.clear()
        gate.entered.clear()
        streams = [served.submit([i], greedy(3)) for i in range(7)]  # 2 seats, 5 may wait
        with pytest.raises(Overloaded, match="5") as refused:
            served.submit([9], greedy())
        assert refused.value.retry_after_s == 1.0  # they leave fast here
        await entered(gate)  # two have their seats now: the count is the same
        with pytest.raises(Overloaded):
            served.submit([9], greedy())
        with pytest.raises(RequestRefused, match="8 sequences"):
            served.admit(8)
        assert served.metrics.rejected["queue_full"] == 2
        streams[3].abort()
        gate.open.set()
        for i, stream in enumerate(streams):
            assert await tokens_of(stream) == ([] if i == 3 else expected_output([i], 3))
        await until_idle(served)
        served.submit([9], greedy()).abort()

    run(test, limits=ServerLimits(max_waiting=5), max_num_seqs=2)


def test_retry_after_follows_the_rate() -> None:
    async def test(served: AsyncEngine, _gate: Gate) -> None:
        assert served._retry_after_s(100) == 5.0  # nothing is known yet
        now = asyncio.get_running_loop().time()
        served._left_at.extend(now - 10 + i for i in range(10))  # one a second
        assert served._retry_after_s(40) == pytest.approx(20, rel=0.1)
        assert served._retry_after_s(10**6) == 120.0
        served._left_at.clear()
        served._left_at.append(now - 1000)  # too long ago to tell
        assert served._retry_after_s(100) == 5.0

    run(test)


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        streams = [served.submit([i], greedy(20)) for i in range(5)]
        drained = asyncio.create_task(served.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            served.submit([1], greedy())
        assert health(served)[1].status == "draining"
        gate.open.set()
        for i, stream in enumerate(streams):
            assert await tokens_of(stream) == expected_output([i], 20)
        assert await drained is True
        await until_idle(served)

    run(test, max_num_seqs=2)


def test_what_does_not_end_in_time_is_given_up() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        stream = served.submit([1], greedy(200))
        await entered(gate)
        threading.Timer(0.1, gate.open.set).start()
        assert await served.drain(0.02) is False
        with pytest.raises(Draining, match="ended"):
            await tokens_of(stream)
        await until_idle(served)

    run(test)


def test_closing_takes_everything_out() -> None:
    streams: list[Stream] = []

    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        streams.extend(served.submit([i], greedy(100)) for i in range(9))
        await entered(gate)

    served = run(test, max_num_seqs=4)
    assert served.num_unfinished == 0
    assert not served.engine.has_unfinished
    assert served.engine.pool.num_used == 0


def test_a_request_that_takes_too_long() -> None:
    async def test(served: AsyncEngine, gate: Gate) -> None:
        gate.open.clear()
        stream = served.submit([1], greedy(100))
        with pytest.raises(TimedOut, match=r"0\.05 s"):
            await tokens_of(stream)
        gate.open.set()
        await until_idle(served)
        assert len(await tokens_of(served.submit([1], greedy(3)))) == 3

    run(test, limits=ServerLimits(request_timeout_s=0.05))


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([], greedy(), "empty"),
        ([VOCABULARY], greedy(), "token id"),
        ([1] * 256, greedy(), "no room"),
        ([1] * 31, greedy(), "limit of 30"),
        ([1], greedy(21), "limit of 20"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    prompt: list[int], sampling: SamplingParams, words: str
) -> None:
    limits = ServerLimits(max_prompt_tokens=30 if len(prompt) == 31 else None, max_output_tokens=20)

    async def test(served: AsyncEngine, _gate: Gate) -> None:
        with pytest.raises(RequestRefused, match=words):
            served.submit(prompt, sampling)
        assert served.num_unfinished == 0
        # Who asks for no length gets what is allowed.
        assert len(await tokens_of(served.submit([1], greedy(None, min_tokens=50)))) == 20

    run(test, limits=limits)


def test_stop_texts_without_a_tokenizer_are_refused() -> None:
    async def test(served: AsyncEngine, _gate: Gate) -> None:
        with pytest.raises(RequestRefused, match="tokenizer"):
            await tokens_of(served.submit([1], greedy(5, stop=["x"])))

    run(test)
