"""Tasks of EleutherAI's lm-eval, answered by the bundled engine.

lm-eval is no dependency: it is imported when tasks are asked for. It fetches the data of a task
that has none on this machine, so only tasks that the user named are touched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from autotune.errors import BadInput, EnvironmentMissing
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.kv_cache import cache_dtype
from engine.loading import LoadedModel, load_model
from engine.quantize.quality import next_token_log_probs, text_caches
from engine.request import SamplingParams

# What lm-eval's own models generate where a task does not say.
DEFAULT_MAX_TOKENS = 256


def check_lm_eval() -> None:
    """See that lm-eval is installed.

    Raises:
        EnvironmentMissing: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentMissing(
            "--lm-eval-tasks needs lm-eval, which is not installed: pip install 'lm-eval>=0.4.9'"
        )


def run_tasks(
    config: EngineConfig, tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores of a configuration by task and metric, as lm-eval reports them.

    `limit` bounds the examples of each task.

    Raises:
        EnvironmentMissing: lm-eval is not installed, or a task's data cannot be had.
        BadInput: lm-eval does not know a task, or the model has no tokenizer.
    """
    check_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    unknown = [task for task in tasks if not known.match_tasks([task])]
    if unknown:
        raise BadInput(f"--lm-eval-tasks: lm-eval has no task {', '.join(unknown)}")
    with contextlib.closing(load_model(config)) as loaded:
        answers = EngineAnswers(loaded, config)
        try:
            found = lm_eval.simple_evaluate(
                model=_as_lm(answers),
                tasks=list(tasks),
                limit=limit,
                bootstrap_iters=0,
                task_manager=known,
            )
        except (OSError, ValueError) as error:
            # What `datasets` raises where a task's data is neither here nor within reach.
            raise EnvironmentMissing(
                f"lm-eval could not run {', '.join(tasks)}: {error}"
            ) from error
    return {
        task: {name: float(value) for name, value in scores.items() if _is_number(value)}
        for task, scores in (found or {}).get("results", {}).items()
    }


class EngineAnswers:
    """What lm-eval asks of a model: likelihoods of continuations and of texts, and generation.

    Args:
        loaded: a model with a tokenizer.
        config: the one that it was loaded with.

    Raises:
        BadInput: the model has no tokenizer.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        if loaded.tokenizer is None:
            raise BadInput(
                f"{config.model} has no tokenizer, and lm-eval's tasks are texts: add --tokenizer"
            )
        self._tokenizer = loaded.tokenizer
        self._decoder = loaded.runner.decoder
        self._longest = loaded.runner.max_model_len
        self._engine = loaded.engine(config)
        dtype = cache_dtype(config, self._decoder.dtype)
        self._caches = text_caches(self._decoder, self._longest, dtype)
        # Every text begins with this token, as in lm-eval's own models.
        first = open_model_folder(config.model).config.get("bos_token_id")
        self._first = int(first) if isinstance(first, int) else (*loaded.eos_token_ids, 0)[0]
        self._prefix = len(self._tokenizer.encode(""))

    def continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log-likelihood in nats, whether greedy decoding would say it) of a continuation.

        Spaces at the end of the context belong to the continuation: tokenizers join them to the
        word that follows. Where both are too long for the model, the context's beginning goes.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context:
            whole = self._tokenizer.encode(context + continuation)
            ahead = self._tokenizer.encode(context)
            return self._score(ahead, whole[len(ahead) :])
        return self._score([self._first], self._tokens(continuation))

    def text(self, text: str) -> float:
        """Log-likelihood in nats of a whole text, each token predicted once."""
        windows = rolling_windows(self._tokens(text), self._first, self._longest)
        return sum(self._score(context, targets)[0] for context, targets in windows)

    def generate(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Greedy continuations (or sampled, where a task says so), batched by the engine.

        Each is asked for as (context, lm-eval's `gen_kwargs`).
        """
        texts = [""] * len(asked)
        for index, (context, options) in enumerate(asked):
            sampling = _sampling(options)
            most = max(1, self._longest - (sampling.max_tokens or DEFAULT_MAX_TOKENS))
            self._engine.add(str(index), self._tokenizer.encode(context)[-most:], sampling)
        while self._engine.has_unfinished:
            for output in self._engine.step():
                texts[int(output.request_id)] += output.text
        return texts

    def _tokens(self, text: str) -> list[int]:
        """Tokens of a text without those that the tokenizer puts before every text."""
        return self._tokenizer.encode(text)[self._prefix :]

    def _score(self, context: Sequence[int], targets: Sequence[int]) -> tuple[float, bool]:
        if not targets:
            return 0.0, True
        ids = torch.tensor([*context, *targets])[-(self._longest + 1) :]
        wanted = min(len(targets), len(ids) - 1)
        first = len(ids) - 1 - wanted  # the position that predicts the first target
        total, greedy = 0.0, True
        with torch.inference_mode():
            for start, rows in next_token_log_probs(self._decoder, self._caches, ids[:-1]):
                at = max(first, start)
                scored = rows[at - start :]
                if len(scored):
                    truth = ids[at + 1 : at + 1 + len(scored)].to(rows.device)
                    total += float(scored.gather(1, truth[:, None]).double().sum())
                    greedy = greedy and bool((scored.argmax(-1) == truth).all())
        return total, greedy


def rolling_windows(
    ids: Sequence[int], first: int, longest: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, targets) pairs in which each token of a text is a target once.

    The first window begins with the token `first`; every other one has as much context as the model
    takes, `longest` tokens of context and all targets but the last together.
    """
    if ids:
        yield [first], list(ids[:longest])
    for start in range(longest, len(ids), longest):
        end = min(start + longest, len(ids))
        yield list(ids[end - longest - 1 : start]), list(ids[start:end])


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    until = options.get("until") or ()
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    return SamplingParams(
        max_tokens=int(
            options.get("max_gen_toks") or options.get("max_tokens") or DEFAULT_MAX_TOKENS
        ),
        temperature=temperature,
        top_p=float(options.get("top_p") or 1.0),
        stop=(until,) if isinstance(until, str) else tuple(until),
        seed=0,
    )


def _as_lm(answers: EngineAnswers) -> Any:
    """The answers behind lm-eval's interface."""
    from lm_eval.api.model import LM

    class EngineLM(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return [answers.continuation(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [answers.text(request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return answers.generate([request.args for request in requests])

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return EngineLM()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
