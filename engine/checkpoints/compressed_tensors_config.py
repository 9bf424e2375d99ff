"""The `quantization_config` of compressed-tensors: which scheme each module has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from engine.checkpoints.module_patterns import compile_pattern
from engine.checkpoints.native_fp8 import block_shape
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields

Strategy = Literal["tensor", "channel", "group", "block"]
PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES: dict[str, Strategy] = {
    "tensor": "tensor",
    "channel": "channel",
    "group": "group",
    "block": "block",
}
_REGEX = "re:"


@dataclass(frozen=True, slots=True)
class Activations:
    """How a layer's inputs are rounded: to "int" or "float" of `bits`, by fixed scales or not."""

    kind: Literal["int", "float"]
    bits: int
    static: bool
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a group of layers are stored, and their inputs rounded.

    `format` is None where the config leaves it to the tensors. `group_size` in columns is of the
    strategy "group", `block` (rows, columns) of "block".
    """

    format: str | None
    kind: Literal["int", "float"]
    bits: int
    strategy: Strategy
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None
    activations: Activations | None

    def describe(self) -> str:
        """For people: "int4 group 128", "int8 channel, dynamic int8 activations"."""
        size = f" {self.group_size}" if self.strategy == "group" else ""
        if self.block is not None:
            size = " {}x{}".format(*self.block)
        number = f"int{self.bits}" if self.kind == "int" else "fp8"
        text = f"{number} {self.strategy}{size}"
        if self.activations is None:
            return text
        when = "static" if self.activations.static else "dynamic"
        rounded = "fp8" if self.activations.kind == "float" else f"int{self.activations.bits}"
        return f"{text}, {when} {rounded} activations"


class Schemes:
    """The schemes of a checkpoint by module.

    A module takes the scheme of the most specific target that fits it, as compressed-tensors does:
    its name, then a pattern ("re:…"), then its class; unless `ignore` fits it.

    Raises:
        ModelError: a field is missing or bad, or asks for what is not supported.
    """

    def __init__(self, config: ConfigFields) -> None:
        self.source = config.source
        _refuse_unsupported(config)
        groups = config.values.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ModelError(f"{config.source}: config_groups must be an object of groups")
        default_format = config.values.get("format")
        self.all: list[Scheme] = []
        targets: list[tuple[str, Scheme]] = []
        for name, values in groups.items():
            source = f"{config.source}: config_groups: {name}"
            if not isinstance(values, dict):
                raise ModelError(f"{source} must be an object, got {values!r}")
            group = ConfigFields(values, source)
            if group.values.get("weights") is None:
                continue
            scheme = _scheme(group, default_format)
            self.all.append(scheme)
            targets += [(target, scheme) for target in _texts(group, "targets")]
        targets.sort(key=lambda entry: entry[0])
        self._names: dict[str, Scheme] = {}
        self._patterns: list[tuple[re.Pattern[str], Scheme]] = []
        for text, scheme in targets:
            if text.startswith(_REGEX):
                self._patterns.append((self._compile(text), scheme))
            else:
                self._names.setdefault(text, scheme)
        ignored = _texts(config, "ignore")
        self._ignored = frozenset(text for text in ignored if not text.startswith(_REGEX))
        self._ignored_patterns = [self._compile(t) for t in ignored if t.startswith(_REGEX)]

    def of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its name; None where it is left in floats."""
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        if module in self._ignored or kind in self._ignored:
            return None
        if any(pattern.match(module) for pattern in self._ignored_patterns):
            return None
        if module in self._names:
            return self._names[module]
        for pattern, scheme in self._patterns:
            if pattern.match(module):
                return scheme
        return self._names.get(kind)

    def _compile(self, text: str) -> re.Pattern[str]:
        return compile_pattern(text.removeprefix(_REGEX), self.source)


def _refuse_unsupported(config: ConfigFields) -> None:
    sparsity = config.values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise ModelError(
            f"{config.source}: sparsity_config of format {sparsity['format']!r} is not supported; "
            "save the model without sparse compression"
        )
    if config.values.get("transform_config"):
        raise ModelError(
            f"{config.source}: transform_config (rotations of activations while serving) is not "
            "supported"
        )


def _scheme(group: ConfigFields, default_format: object) -> Scheme:
    weights = group.mapping("weights")
    if weights is None:
        raise ModelError(f"{group.source}: weights must be an object with fields")
    kind = _kind(weights)
    bits = weights.integer("num_bits", 8)
    if (kind == "float" and bits != 8) or not 2 <= bits <= 8:
        raise ModelError(
            f"{weights.source}: num_bits={bits} of type {kind} is not supported; supported are int "
            "of 2 to 8 bits and float of 8"
        )
    strategy, size = _strategy(weights)
    block = None
    if strategy == "block":
        if kind == "int":
            raise ModelError(f"{weights.source}: strategy 'block' is supported for float alone")
        block = block_shape(weights.values.get("block_structure"), weights.source)
        if block is None:
            raise ModelError(f"{weights.source}: block_structure is missing")
    stored = group.values.get("format") or default_format
    if stored in ("mixed-precision", None):
        stored = None
    elif stored != PACKED and stored not in PLAIN:
        raise ModelError(
            f"{group.source}: format {stored!r} of compressed-tensors is not supported; supported "
            f"are {', '.join((PACKED, *PLAIN))}"
        )
    symmetric = weights.boolean("symmetric", True)
    if not symmetric and kind == "float":
        raise ModelError(f"{weights.source}: symmetric must be true for type float")
    return Scheme(stored, kind, bits, strategy, symmetric, size, block, _activations(group))


def _strategy(weights: ConfigFields) -> tuple[Strategy, int]:
    """The strategy and its group size, 0 if it has none."""
    size = weights.values.get("group_size")
    if size is not None and (type(size) is not int or size < -1):
        raise ModelError(f"{weights.source}: group_size must be a positive integer, got {size!r}")
    named = weights.values.get("strategy")
    if named is None:
        named = "tensor" if not size else "group" if size > 0 else "channel"
    strategy = _STRATEGIES.get(str(named).lower())
    if strategy is None:
        raise ModelError(
            f"{weights.source}: strategy {named!r} is not supported; supported are "
            f"{', '.join(_STRATEGIES)}"
        )
    if strategy != "group":
        return strategy, 0
    return strategy, weights.integer("group_size")


def _kind(fields: ConfigFields) -> Literal["int", "float"]:
    kind = fields.text("type", "int").lower()
    if kind == "int":
        return "int"
    if kind == "float":
        return "float"
    raise ModelError(f"{fields.source}: type must be int or float, got {kind!r}")


def _activations(group: ConfigFields) -> Activations | None:
    fields = group.mapping("input_activations")
    if fields is None:
        return None
    dynamic = fields.values.get("dynamic", False)
    if type(dynamic) is not bool:
        raise ModelError(f"{fields.source}: dynamic {dynamic!r} is not supported; true or false is")
    return Activations(
        _kind(fields), fields.integer("num_bits", 8), not dynamic, fields.boolean("symmetric", True)
    )


def _texts(fields: ConfigFields, name: str) -> list[str]:
    values: Any = fields.values.get(name)
    if values is None:
        return []
    if not isinstance(values, list) or any(not isinstance(text, str) for text in values):
        raise ModelError(f"{fields.source}: {name} must be a list of texts, got {values!r}")
    return list(values)
