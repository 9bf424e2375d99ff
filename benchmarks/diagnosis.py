"""Bottlenecks made for real on the bundled engine, and what the diagnosis names.

Each is injected into the engine that serves the embedded model (a slowed device, a small cache, a
burst ...), offered for one to four seconds, profiled and diagnosed. It counts as named if it stands
first in its metric.

    python -m benchmarks.diagnosis --out benchmarks/results/<machine>/diagnosis.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from autotune.diagnose.diagnose import diagnose
from tests.autotune.diagnose.injected import (
    HEALTHY,
    INJECTIONS,
    LINK_SECONDS,
    SLOW_LINKS,
    SLOW_RANK,
    Harness,
    Injection,
)
from tests.autotune.diagnose.two_ranks import SlowRank, slow_links

Around = Callable[[Harness], AbstractContextManager[Any]]


def main() -> int:
    """Run the injections asked for and print what was named."""
    arguments = _arguments()
    results: list[dict[str, Any]] = []
    alone = [i for i in INJECTIONS if arguments.only in i.name]
    with _harness() as harness:
        for injection in alone:
            results += _rounds(harness, injection, arguments.rounds)
        control = _control(harness)
    if not arguments.one_rank:
        together: list[tuple[Injection, Around]] = [
            (SLOW_LINKS, lambda h: slow_links(_ranks(h), LINK_SECONDS)),
            (SLOW_RANK, lambda h: SlowRank(_ranks(h).workers.pids()[1])),
        ]
        asked = [(i, around) for i, around in together if arguments.only in i.name]
        if asked:
            with _harness(tensor_parallel_size=2) as harness:
                for injection, around in asked:
                    results += _rounds(harness, injection, arguments.rounds, around)
    named = sum(result["named_first"] for result in results)
    kinds = {result["bottleneck"] for result in results}
    summary = {
        "injected": len(results),
        "kinds": len(kinds),
        "named_first": named,
        "control": control,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "results": results,
    }
    print(f"{named} of {len(results)} named first ({len(kinds)} kinds)")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0 if named == len(results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is injected")
    parser.add_argument("--only", default="", help="only those with this in their name")
    parser.add_argument("--one-rank", action="store_true", help="leave out tensor parallelism")
    return parser.parse_args()


@contextlib.contextmanager
def _harness(**knobs: Any) -> Iterator[Harness]:
    harness = Harness(**knobs)
    try:
        yield harness
    finally:
        harness.close()


def _ranks(harness: Harness) -> Any:
    return harness.loaded.runner.decoder.ranks


def _rounds(
    harness: Harness, injection: Injection, rounds: int, around: Around | None = None
) -> list[dict[str, Any]]:
    results = []
    for number in range(rounds):
        begin = time.perf_counter()
        profile = harness.profile(injection, None if around is None else around(harness))
        found = diagnose(profile).of(injection.metric)
        first = found[0] if found else None
        right = first is not None and first.bottleneck == injection.bottleneck
        results.append(
            {
                "injected": injection.name,
                "bottleneck": injection.bottleneck,
                "metric": injection.metric,
                "round": number,
                "named_first": right,
                "findings": [
                    {"bottleneck": f.bottleneck, "share": f.share, "severity": f.severity}
                    for f in found
                ],
                "sentence": None if first is None else first.sentence,
                "seconds": time.perf_counter() - begin,
            }
        )
        said = "nothing" if first is None else f"{first.bottleneck} ({first.share:.0%})"
        print(
            f"{'ok ' if right else 'NOT'} {injection.name:36} {injection.metric:10} {said}",
            file=sys.stderr,
        )
    return results


def _control(harness: Harness) -> dict[str, Any]:
    """What is named of a server without fault."""
    found = diagnose(harness.profile(HEALTHY)).findings
    return {
        "high": [f"{f.metric}: {f.bottleneck}" for f in found if f.level == "high"],
        "medium": [f"{f.metric}: {f.bottleneck}" for f in found if f.level == "medium"],
    }


if __name__ == "__main__":
    sys.exit(main())
