"""Offline generation, as vLLM's `LLM`: prompts in, finished outputs out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.loading import load_model
from engine.output import RequestOutput
from engine.request import FinishReason, SamplingParams, TokenLogprobs

Prompt = str | Sequence[int]


@dataclass(slots=True)
class CompletionOutput:
    """What was generated for a prompt.

    `finish_reason` is `stop`, `length`, `abort` or `refused`. `logprobs` stands beside `token_ids`
    if it was asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class GenerateOutput:
    """The output of one prompt; `prompt` is its text if it was given as one.

    `refusal` says why a request was refused or given up. `num_cached_tokens` of the prompt were
    found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    refusal: str | None = None
    num_cached_tokens: int = 0


class LLM:
    """A loaded model that generates for batches of prompts.

    Args:
        model: folder of a Hugging Face model.
        knobs: any other field of `EngineConfig`.

    Raises:
        ConfigError: an unknown or bad knob.
        ModelError: the folder is missing, broken or of an unsupported architecture.
        EnvironmentLacks: no such device, or not enough memory.
    """

    def __init__(self, model: str, **knobs: Any) -> None:
        config = EngineConfig.from_mapping({"model": str(model), **knobs})
        self._loaded = loaded = load_model(config)
        self.tokenizer = loaded.tokenizer
        self.engine = loaded.engine(config)
        self._ids = itertools.count()

    @property
    def config(self) -> EngineConfig:
        """The knobs in force."""
        return self.engine.config

    def close(self) -> None:
        """End the processes of a model that is divided; nothing can be generated then.

        They end with this object and with this process too.
        """
        self._loaded.close()

    def reconfigure(self, **knobs: Any) -> EngineConfig:
        """Change `live` and `cache` knobs without loading the model again.

        Raises:
            ConfigError: a bad value, or a knob that needs the model loaded again.
            EnvironmentLacks: no memory for the new KV cache; the old config is in force.
        """
        return self.engine.reconfigure(**knobs)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[GenerateOutput]:
        """Generate for every prompt, batched; outputs are in the order of the prompts.

        Args:
            prompts: texts or lists of token ids; a single one is a batch of one.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show progress on stderr.

        A request that can never be served gets an output with `finish_reason` "refused" and its
        reason in `refusal`; the others are served.

        Raises:
            ConfigError: as many params as prompts are wanted.
            ModelError: a prompt is a text and the model has no tokenizer.
        """
        batch = _as_batch(prompts)
        params = _as_params(sampling_params, len(batch))
        results: dict[str, GenerateOutput] = {}
        token_ids = [self._encode(prompt) for prompt in batch]
        for prompt, ids, sampling in zip(batch, token_ids, params, strict=True):
            request_id = str(next(self._ids))
            self.engine.add(request_id, ids, sampling)
            completion = CompletionOutput(logprobs=None if sampling.logprobs is None else [])
            text = prompt if isinstance(prompt, str) else None
            results[request_id] = GenerateOutput(request_id, text, ids, [completion])
        with _progress(len(batch), use_tqdm) as progress:
            try:
                while self.engine.has_unfinished:
                    self._wait()
                    for output in self.engine.step():
                        _collect(results[output.request_id], output)
                        if output.finish_reason is not None:
                            progress.advance(progress.task_ids[0])
            except BaseException:  # an interrupt too: leave the engine empty for the next call
                self.engine.abort_all()
                self.engine.step()
                raise
        return list(results.values())

    def _wait(self) -> None:
        """Sleep while dynamic batching waits for a full batch."""
        wakeup = self.engine.next_wakeup()
        if wakeup is not None:
            time.sleep(max(wakeup - self.engine.clock(), 0.0))

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ModelError(
                f"{self.config.model} has no tokenizer.json, so prompts must be token ids: copy "
                "the model's tokenizer there or name its folder with the knob tokenizer"
            )
        return self.tokenizer.encode(prompt)


def _collect(result: GenerateOutput, output: RequestOutput) -> None:
    completion = result.outputs[0]
    completion.token_ids += output.token_ids
    completion.text += output.text
    if output.logprobs is not None and completion.logprobs is not None:
        completion.logprobs += output.logprobs
    if output.finish_reason is not None:
        completion.finish_reason = FinishReason(output.finish_reason).value
        result.refusal = output.refusal
        result.num_cached_tokens = output.request.num_cached_tokens


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(item, int) for item in prompts):
        return [[item for item in prompts if isinstance(item, int)]]
    return [item for item in prompts if not isinstance(item, int)]


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ConfigError(
            f"{len(params)} sampling_params were given for {count} prompts: give one for all or "
            "one for each"
        )
    return list(params)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Progress]:
    with Progress(console=Console(stderr=True), disable=not shown) as progress:
        progress.add_task("Generating", total=total)
        yield progress
