"""A scheduler without an engine, and short ways to feed and step it."""

from engine.batch import Batch, BatchResult
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler

EOS = 40
STEP = 0.01


def make_scheduler(num_blocks: int = 64, max_model_len: int = 256, **knobs: object) -> Scheduler:
    config = EngineConfig.from_mapping({"block_size": 8, **knobs})
    pool = BlockPool(num_blocks, 8, config.enable_prefix_caching)
    return Scheduler(config, pool, max_model_len, frozenset({EOS}), vocab_size=50)


def make_request(
    name: str,
    prompt: int | list[int] = 8,
    max_tokens: int | None = 4,
    *,
    arrival: float = 0.0,
    priority: int = 0,
    **sampling: object,
) -> Request:
    # Prompts given by length differ from their first token on, so that none shares a prefix.
    tokens = [hash_of(name), *([1] * (prompt - 1))] if isinstance(prompt, int) else [*prompt]
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(name, tokens, params, arrival, priority)


def hash_of(name: str) -> int:
    return sum(map(ord, name)) % 50


def answer(batch: Batch, token: int = 3) -> BatchResult:
    return BatchResult([[token] if s.samples else [] for s in batch.sequences], STEP)


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    return [(s.request.request_id, s.start, s.num_tokens) for s in batch.sequences]


def step(scheduler: Scheduler, now: float = 0.0, token: int = 3) -> list[tuple[str, int, int]]:
    batch = scheduler.schedule(now)
    scheduler.check_integrity()
    assert all(s.num_tokens == 1 and s.samples for s in batch.sequences[: batch.num_decodes])
    scheduler.update(batch, answer(batch, token))
    scheduler.check_integrity()
    return shape(batch)


def finish_all(scheduler: Scheduler, limit: int = 1000) -> list[str]:
    """Step to the end; the ids in the order in which they finished."""
    order: list[str] = []
    for _ in range(limit):
        batch = scheduler.schedule(0.0)
        scheduler.check_integrity()
        if not batch.sequences:
            assert scheduler.num_unfinished == 0
            assert scheduler.pool.num_used == 0
            return order
        order += [r.request_id for r in scheduler.update(batch, answer(batch))]
    raise AssertionError("the scheduler did not come to an end")
