"""Serves one load on several engines in short turns, so that a drifting machine meets all alike.

A machine's speed differs by a tenth within minutes, and so would engines that are measured one
after the other. Here the one that has got least far goes on for some steps, so that all do the same
part of the load within a fraction of a second; each has a clock that runs in its own turns alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autotune.load.open_loop import GREEDY
from autotune.load.quiet import quiet_interpreter
from autotune.workload.materialise import LoadRequest
from engine.engine import Engine
from engine.request import SamplingParams
from engine.step_record import StepRecord

# Steps of a turn. The first finds another engine's data in the processor's caches.
STEPS = 12


@dataclass
class Player:
    """An engine that serves loads, each of which begins when the one before has ended.

    `token_times` are those of each request's tokens on the player's own clock; `duration` is what
    all loads took by it. Times in seconds.
    """

    engine: Engine
    loads: Sequence[Sequence[LoadRequest]]
    sampling: SamplingParams = GREEDY
    duration: float = 0.0
    tokens: int = 0
    done: bool = False
    token_times: dict[str, list[float]] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._new: list[tuple[str, int]] = []
        self._playing = self._play()

    def turn(self, steps: int = STEPS) -> None:
        """Go on for so many steps, or to the end."""
        previous, self.engine.on_step = self.engine.on_step, self.steps.append
        began = time.perf_counter()
        try:
            for _ in range(steps):
                if next(self._playing, None) is None:
                    self.done = True
                    break
                self._stamp(self.duration + time.perf_counter() - began)
        finally:
            self.duration += time.perf_counter() - began
            self.engine.on_step = previous

    def tpot(self) -> float:
        """Mean seconds a token after the first, over requests."""
        each = [(t[-1] - t[0]) / (len(t) - 1) for t in self.token_times.values()]
        return sum(each) / len(each)

    def throughput(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.duration

    def _play(self) -> Iterator[bool]:
        engine = self.engine
        for load in self.loads:
            engine.clear_prefix_cache()
            for request in load:
                sampling = dataclasses.replace(
                    self.sampling, max_tokens=request.output_tokens, ignore_eos=True
                )
                engine.add(request.request_id, request.token_ids, sampling)
                self.token_times[request.request_id] = []
            while engine.has_unfinished:
                self._new = [(o.request_id, len(o.token_ids)) for o in engine.step()]
                yield True

    def _stamp(self, now: float) -> None:
        for name, count in self._new:
            self.token_times[name] += [now] * count
            self.tokens += count


def play_in_turns(players: Mapping[str, Player]) -> None:
    """Let all play to the end, whoever has got least far going on."""
    with quiet_interpreter():
        while left := [player for player in players.values() if not player.done]:
            min(left, key=lambda player: player.tokens).turn()
