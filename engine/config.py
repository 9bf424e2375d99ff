"""Every knob of the engine, declared exactly once.

Command-line options, search spaces, exports and the report's labels are derived from these
declarations (`KNOBS`), so a knob is added by adding one field here. Names are vLLM's where it has
one. `reload` says what a change costs:

- `live`: takes effect on the next step;
- `cache`: the KV cache is rebuilt;
- `weights`: the model is loaded again.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ConfigError
from engine.quantize.method_table import METHODS
from engine.speculate.draft import MOST_DRAFTED

Reload = Literal["live", "cache", "weights"]
# What the speculative methods that have weights of their own need.
MODEL_METHODS = {
    "draft_model": "a smaller model of the same vocabulary",
    "medusa": "heads that were trained for the model (autotune train-medusa)",
}
RELOAD_ORDER: tuple[Reload, ...] = ("live", "cache", "weights")


@dataclass(frozen=True, slots=True)
class Knob:
    """What is known of one field of `EngineConfig`.

    `minimum` and `maximum` are inclusive and in `unit`. `choices` lists the allowed values of a
    categorical knob. `devices` names the device types on which the knob has an effect. `tunable`
    is false for what a search must not choose (the model, the device, the seed).
    """

    name: str
    type: type
    default: Any
    optional: bool
    help: str
    unit: str
    reload: Reload
    minimum: float | None
    maximum: float | None
    choices: tuple[Any, ...] | None
    devices: tuple[str, ...]
    tunable: bool

    @property
    def flag(self) -> str:
        """The command-line spelling, for instance `--max-num-seqs`."""
        return "--" + self.name.replace("_", "-")


def _knob(
    default: Any,
    text: str,
    *,
    reload: Reload,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[Any, ...] | None = None,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    tunable: bool = True,
) -> Any:
    return field(
        default=default,
        metadata={
            "help": text,
            "reload": reload,
            "unit": unit,
            "minimum": minimum,
            "maximum": maximum,
            "choices": choices,
            "devices": devices,
            "tunable": tunable,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Configuration of one engine; immutable, checked when made.

    Raises:
        ConfigError: a value is out of bounds or two knobs contradict each other.
    """

    model: str = _knob(
        "", "Folder of a Hugging Face model, or a .gguf file.", reload="weights", tunable=False
    )
    tokenizer: str | None = _knob(
        None, "Folder of the tokenizer, if not the model's.", reload="weights", tunable=False
    )
    device: str = _knob(
        "auto",
        "Device to run on; auto takes a GPU when there is one.",
        reload="weights",
        choices=("auto", "cpu", "cuda"),
        tunable=False,
    )
    dtype: str = _knob(
        "auto",
        "Type of weights and activations; auto follows the checkpoint.",
        reload="weights",
        choices=("auto", "bfloat16", "float16", "float32"),
        tunable=False,
    )
    tensor_parallel_size: int = _knob(
        1,
        "Devices that the model is divided among, a process each. On a CPU it is for tests: the "
        "processes share the cores and the memory.",
        reload="weights",
        unit="devices",
        choices=(1, 2, 4, 8, 16),
    )
    max_model_len: int | None = _knob(
        None,
        "Longest sequence, prompt and output together; by default the model's own limit.",
        reload="cache",
        unit="tokens",
        minimum=1,
        tunable=False,
    )
    seed: int = _knob(0, "Seed of everything random.", reload="live", minimum=0, tunable=False)
    quantization: str = _knob(
        "none",
        "Weight quantization. none keeps the checkpoint as it is. W8A8 with dynamic activations: "
        "int8, llm_int8 (outliers in floats), smoothquant, fp8. Weight-only 4 bits in groups: "
        "int4, nf4, gptq, awq. smoothquant, gptq and awq read a calibration text once.",
        reload="weights",
        choices=tuple(METHODS),
    )
    calibration: str | None = _knob(
        None,
        "Text file that smoothquant, gptq and awq calibrate on, best the prompts to be served; by "
        "default a built-in sample of English documentation.",
        reload="weights",
        tunable=False,
    )
    kv_cache_dtype: str = _knob(
        "auto",
        "Type of the cached keys and values: int8 and fp8 (e4m3) take about half the memory of "
        "16-bit ones, with a scale for each head of each token; auto is the model's own.",
        reload="cache",
        choices=("auto", "int8", "fp8"),
    )
    block_size: int = _knob(
        16,
        "Tokens in one block of the KV cache.",
        reload="cache",
        unit="tokens",
        choices=(8, 16, 32, 64, 128),
    )
    gpu_memory_utilization: float = _knob(
        0.9,
        "Share of the device's memory for weights, activations and KV cache together.",
        reload="cache",
        minimum=0.05,
        maximum=0.99,
        devices=("cuda",),
    )
    cuda_graphs: bool = _knob(
        True,
        "Capture decode steps as CUDA graphs at a ladder of batch sizes, so that the host launches "
        "a step at once; they take some of the memory.",
        reload="cache",
        devices=("cuda",),
    )
    kv_cache_memory_bytes: int | None = _knob(
        None,
        "Memory of the KV cache, of each rank where there are several; overrides "
        "gpu_memory_utilization. On a CPU the default is 4 GiB or a quarter of the free memory, "
        "whichever is less, in all.",
        reload="cache",
        unit="bytes",
        minimum=1,
    )
    enable_prefix_caching: bool = _knob(
        True, "Share the KV blocks of equal prompt prefixes.", reload="live"
    )
    max_num_seqs: int = _knob(
        256,
        "Most sequences in one step.",
        reload="live",
        unit="sequences",
        minimum=1,
        maximum=4096,
    )
    max_num_batched_tokens: int = _knob(
        2048,
        "Most tokens in one step, prompt chunks and decodes together.",
        reload="live",
        unit="tokens",
        minimum=1,
        maximum=1 << 20,
    )
    enable_chunked_prefill: bool = _knob(
        True, "Split long prompts over several steps, mixed with decodes.", reload="live"
    )
    long_prefill_token_threshold: int = _knob(
        0,
        "Most prompt tokens of one request in one step; 0 sets no limit of its own.",
        reload="live",
        unit="tokens",
        minimum=0,
        maximum=1 << 20,
    )
    scheduling_policy: str = _knob(
        "fcfs",
        "Order of the waiting queue: first come, given priority, or shortest job first.",
        reload="live",
        choices=("fcfs", "priority", "sjf"),
    )
    batching_mode: str = _knob(
        "continuous",
        "continuous admits requests at every step; static fills a batch and runs it to its end; "
        "dynamic is static with a limit on the wait for a full batch (max_queue_delay). The last "
        "two are baselines to compare with.",
        reload="live",
        choices=("continuous", "static", "dynamic"),
        tunable=False,
    )
    max_queue_delay: float = _knob(
        0.05,
        "Longest wait for a full batch in dynamic batching.",
        reload="live",
        unit="seconds",
        minimum=0.0,
        maximum=60.0,
        tunable=False,
    )
    max_num_queued_reqs: int | None = _knob(
        None,
        "Refuse new requests while this many wait; none refuses no request for that.",
        reload="live",
        unit="requests",
        minimum=1,
        tunable=False,
    )
    watermark: float = _knob(
        0.0,
        "Share of the KV blocks kept free when a waiting request is admitted, so that running "
        "ones are preempted less.",
        reload="live",
        minimum=0.0,
        maximum=0.5,
    )
    speculative_method: str = _knob(
        "none",
        "Who drafts tokens that one step then verifies: ngram looks the last tokens up in the "
        "request's own text, suffix in recent outputs of others as well, draft_model is a smaller "
        "model, medusa are heads trained for the model. Outputs stay what they were.",
        reload="cache",
        choices=("none", "ngram", "suffix", "draft_model", "medusa"),
    )
    speculative_model: str | None = _knob(
        None,
        "Folder of the smaller model of the same vocabulary (draft_model), or of the heads "
        "(medusa).",
        reload="cache",
        tunable=False,
    )
    num_speculative_tokens: int = _knob(
        4,
        "Most tokens drafted for one request in one step; of a tree, its size.",
        reload="live",
        unit="tokens",
        minimum=1,
        maximum=MOST_DRAFTED,
    )
    speculative_adaptive: bool = _knob(
        True,
        "Draft fewer tokens, or none, where what was accepted so far and the load say that more "
        "would cost time.",
        reload="live",
    )
    prompt_lookup_min: int = _knob(
        2,
        "Fewest last tokens that must occur before for what followed them to be drafted (ngram, "
        "suffix).",
        reload="live",
        unit="tokens",
        minimum=1,
        maximum=32,
    )
    prompt_lookup_max: int = _knob(
        4,
        "Most last tokens that are looked up, the longest match first (ngram, suffix).",
        reload="live",
        unit="tokens",
        minimum=1,
        maximum=32,
    )
    prompt_lookup_window: int = _knob(
        0,
        "Tokens before the last that are searched (ngram, suffix); 0 searches all.",
        reload="live",
        unit="tokens",
        minimum=0,
        maximum=1 << 20,
        tunable=False,
    )
    num_threads: int | None = _knob(
        None,
        "CPU threads of the engine; by default all cores.",
        reload="live",
        unit="threads",
        minimum=1,
        maximum=1024,
        devices=("cpu",),
    )

    def __post_init__(self) -> None:
        for knob in KNOBS.values():
            _check(knob, getattr(self, knob.name))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below "
                f"max_num_seqs={self.max_num_seqs}: a step must have room for one token of every "
                "sequence; raise the first or lower the second"
            )
        if (
            not self.enable_chunked_prefill
            and self.max_model_len is not None
            and self.max_num_batched_tokens < self.max_model_len
        ):
            raise ConfigError(
                f"enable_chunked_prefill=false needs max_num_batched_tokens of at least "
                f"max_model_len={self.max_model_len}, got {self.max_num_batched_tokens}: without "
                "chunks a prompt must fit in one step"
            )
        self._check_speculation()

    def _check_speculation(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min={self.prompt_lookup_min} is above "
                f"prompt_lookup_max={self.prompt_lookup_max}: lower the first or raise the second"
            )
        method = self.speculative_method
        if method == "none":
            return
        if self.num_speculative_tokens >= self.max_num_batched_tokens:
            raise ConfigError(
                f"num_speculative_tokens={self.num_speculative_tokens} does not fit a step of "
                f"max_num_batched_tokens={self.max_num_batched_tokens}, which verifies them beside "
                "the last token: lower the first or raise the second"
            )
        if method in MODEL_METHODS and self.speculative_model is None:
            raise ConfigError(
                f"speculative_method={method} needs speculative_model, the folder of "
                f"{MODEL_METHODS[method]}"
            )

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some knobs changed.

        Raises:
            ConfigError: an unknown knob, a bad value or a contradiction.
        """
        return EngineConfig.from_mapping({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All knobs by name, as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Make a config from names and plain values, as read from YAML or JSON.

        Raises:
            ConfigError: an unknown knob (the nearest names are told) or a bad value.
        """
        for name in values:
            if name not in KNOBS:
                near = difflib.get_close_matches(name, KNOBS, n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise ConfigError(f"unknown knob {name!r}{hint}")
        return cls(**{name: _coerce(KNOBS[name], value) for name, value in values.items()})

    def reload_needed(self, other: EngineConfig) -> Reload | None:
        """The dearest reload that going from this config to `other` costs; None if equal."""
        costs = {
            knob.reload
            for knob in KNOBS.values()
            if getattr(self, knob.name) != getattr(other, knob.name)
        }
        return max(costs, key=RELOAD_ORDER.index) if costs else None


def _describe(field_: dataclasses.Field[Any], hint: Any) -> Knob:
    optional = isinstance(hint, types.UnionType)
    kind = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    return Knob(
        name=field_.name, type=kind, default=field_.default, optional=optional, **field_.metadata
    )


def _coerce(knob: Knob, value: Any) -> Any:
    """Accept what YAML and JSON make of a number: an int where a float is wanted."""
    if knob.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if knob.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check(knob: Knob, value: Any) -> None:
    if value is None and knob.optional:
        return
    if type(value) is not knob.type:  # exact: True must not pass for an int
        raise ConfigError(f"{knob.name} must be of type {knob.type.__name__}, got {value!r}")
    if knob.choices is not None and value not in knob.choices:
        allowed = ", ".join(map(str, knob.choices))
        raise ConfigError(f"{knob.name}={value!r} is not one of {allowed}")
    if not isinstance(value, (int, float)):
        return
    unit = f" {knob.unit}" if knob.unit else ""
    # Written so that NaN, which compares false with everything, is refused too.
    if knob.minimum is not None and not value >= knob.minimum:
        raise ConfigError(f"{knob.name}={value!r} must be at least {knob.minimum}{unit}")
    if knob.maximum is not None and not value <= knob.maximum:
        raise ConfigError(f"{knob.name}={value!r} must be at most {knob.maximum}{unit}")


def _declared() -> dict[str, Knob]:
    hints = typing.get_type_hints(EngineConfig)
    return {f.name: _describe(f, hints[f.name]) for f in dataclasses.fields(EngineConfig)}


KNOBS: Mapping[str, Knob] = types.MappingProxyType(_declared())
