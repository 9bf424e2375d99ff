"""Values that go to another engine in another measure, memory above all.

Each engine means something else by its share of the memory: of the whole device or of what is free
after loading, with the weights or without. A share is therefore never copied; it is worked out
anew from the bytes that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

_GIB = 1 << 30
# A share of everything would leave nothing for activations.
_MOST = 0.95


class NotConvertible(Exception):
    """What the conversion needs is not known; the message says what."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The other engine's value, and how it came about."""

    value: Any
    note: str


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to convert with.

    `facts` holds knobs that have a value, and what was measured by the names of
    `measured_facts`. `lost` names the knobs that do not carry over.
    """

    facts: Mapping[str, Any]
    device: str
    lost: frozenset[str] = frozenset()

    def number(self, name: str, what: str) -> int:
        """One of the facts.

        Raises:
            NotConvertible: it is not known.
        """
        value = self.facts.get(name)
        if value is None:
            raise NotConvertible(f"{what} is not known")
        return int(value)


def convert(how: str, value: Any, known: Known) -> Converted:
    """Convert a knob's value by one of `CONVERSIONS`.

    Raises:
        NotConvertible: something it takes is not known.
    """
    return CONVERSIONS[how](value, known)


def _gib(value: int, _known: Known) -> Converted:
    return Converted(math.ceil(value / _GIB), f"{_size(value)} when measured, in whole GiB here")


def _tokens(value: int, known: Known) -> Converted:
    """Tokens of KV cache that the bytes hold there, and no more than requests could fill."""
    if "kv_cache_dtype" in known.lost:
        tokens = known.number(
            "kv_cache_tokens_unquantized", "the size of a token's keys and values"
        )
        note = f"{_size(value)} when measured hold so many tokens in the model's own type"
    else:
        tokens = known.number("kv_cache_tokens", "the size of a token's keys and values")
        note = f"as many tokens as {_size(value)} held when measured"
    length, seqs = known.facts.get("max_model_len"), known.facts.get("max_num_seqs")
    if length is not None and seqs is not None and tokens > length * seqs:
        tokens = int(length) * int(seqs)
        note = f"max_num_seqs x max_model_len; the {_size(value)} measured would hold more"
    return Converted(tokens, note)


def _same_share(value: float, known: Known) -> Converted:
    """A share that the other engine means as this one does; its bytes are told beside it."""
    held = known.facts.get("kv_cache_memory_bytes")
    if held is None:
        return Converted(value, "")
    return Converted(
        value,
        f"the KV cache came to {_size(held)} of it when measured; kv-cache-memory-bytes: {held} "
        "asks for just that",
    )


def _share_with_weights(value: int, known: Known) -> Converted:
    """(weights + KV cache) / all memory of the device."""
    total, weights = _memory(value, known)
    share = _floor(min(_MOST, (weights + value) / total))
    return Converted(
        share,
        f"here it is (weights + KV cache) / memory: ({_size(weights)} + {_size(value)}) / "
        f"{_size(total)}",
    )


def _share_of_free(value: int, known: Known) -> Converted:
    """KV cache / memory that is free once the weights are loaded."""
    total, weights = _memory(value, known)
    share = _floor(min(_MOST, value / (total - weights)))
    return Converted(
        share,
        f"here it is KV cache / memory free after loading: {_size(value)} / "
        f"({_size(total)} - {_size(weights)} of weights)",
    )


def _memory(value: int, known: Known) -> tuple[int, int]:
    """Bytes of the GPU and of the weights on it."""
    if known.device != "cuda":
        raise NotConvertible(
            "it is a share of a GPU's memory there and this was measured on a CPU, where the KV "
            f"cache had {_size(value)}"
        )
    total = known.number("device_memory_bytes", "the memory of the GPU that this was measured on")
    weights = known.number("weights_bytes", "the size of the weights")
    if weights + value >= total:
        raise NotConvertible("weights and KV cache as they were measured exceed the GPU's memory")
    return total, weights


def _prefill_passes(value: int, known: Known) -> Converted:
    """Passes that the longest prompt takes at so many tokens each."""
    length = known.number("max_model_len", "the longest sequence")
    return Converted(
        math.ceil(length / value), "as many passes as the longest prompt takes in such chunks"
    )


def _core_list(value: int, _known: Known) -> Converted:
    return Converted("0" if value == 1 else f"0-{value - 1}", f"{value} cores; name those you mean")


def _largest_batch(_value: int, known: Known) -> Converted:
    """Captured batches up to `max_num_seqs`."""
    seqs = known.number("max_num_seqs", "max_num_seqs")
    return Converted(seqs, "decode batches of every size up to max_num_seqs are captured")


def _one_more(value: int, _known: Known) -> Converted:
    return Converted(value + 1, "the drafted tokens and the last one, which are verified together")


def _one(_value: int, _known: Known) -> Converted:
    return Converted(1, "one continuation, not a tree")


def _gguf(value: str, _known: Known) -> Converted:
    """The name of the GGUF file of a model."""
    if value.lower().endswith(".gguf"):
        return Converted(value, "")
    path = PurePath(value)
    name = path.name or "model"
    return Converted(
        f"{name}.gguf",
        f"measured from {value}; make the file with llama.cpp's convert_hf_to_gguf.py {value} "
        f"--outfile {name}.gguf",
    )


def _openvino_folder(value: str, _known: Known) -> Converted:
    name = PurePath(value).name or "model"
    return Converted(
        f"{name}-openvino",
        f"measured from {value}; make the folder with optimum-cli export openvino --model {value} "
        f"--weight-format fp16 {name}-openvino",
    )


CONVERSIONS: Mapping[str, Callable[[Any, Known], Converted]] = {
    "value": lambda value, _known: Converted(value, ""),
    "gib": _gib,
    "tokens": _tokens,
    "same_share": _same_share,
    "share_with_weights": _share_with_weights,
    "share_of_free": _share_of_free,
    "prefill_passes": _prefill_passes,
    "core_list": _core_list,
    "largest_batch": _largest_batch,
    "one": _one,
    "one_more": _one_more,
    "gguf": _gguf,
    "openvino_folder": _openvino_folder,
}


def _floor(share: float) -> float:
    """Three digits, rounded down; at least 0.001, since no engine takes 0."""
    return max(1, math.floor(share * 1000)) / 1000


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / (1 << 20):.1f} MiB"
