"""Which knobs a search may choose, and among which values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from autotune.conditional_knobs import GOVERNED, idle_because
from autotune.errors import BadInput
from autotune.fast_yaml import safe_load
from autotune.search.methods_offered import Offer, seed_methods
from autotune.speculative_models import folder_for
from engine.config import KNOBS, MODEL_METHODS, EngineConfig
from engine.errors import ConfigError

# Some bounds concern two knobs; a lone value is judged with room on the other side.
_ROOM_FOR_MANY: Mapping[str, Any] = {"max_num_batched_tokens": 1 << 20}
_ROOM: Mapping[str, Mapping[str, Any]] = {
    "max_num_batched_tokens": {"max_num_seqs": 1},
    "speculative_method": {"speculative_model": "a folder"},
    "prompt_lookup_min": {"prompt_lookup_max": KNOBS["prompt_lookup_max"].maximum},
    "prompt_lookup_max": {"prompt_lookup_min": KNOBS["prompt_lookup_min"].minimum},
}


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Values to try by knob; each list in increasing order where it holds numbers.

    The sampler sees a number's position in its list, not the number, since powers of two are as far
    from each other as neighbours should be; `config_of` and `point_of` translate.

    A knob that does nothing beside another's value (`autotune.conditional_knobs`) has the default's
    value at such a point, so that different points are different engines; `normalised` sees to it.
    """

    values: Mapping[str, tuple[Any, ...]]

    @property
    def size(self) -> int:
        """Number of normalised points."""
        size = 1
        for name, values in self.values.items():
            governed = [
                (GOVERNED[other].among, len(choices))
                for other, choices in self.values.items()
                if other in GOVERNED and GOVERNED[other].by == name
            ]
            if name not in GOVERNED or GOVERNED[name].by not in self.values:
                size *= sum(
                    math.prod(count for among, count in governed if value in among)
                    for value in values
                )
        return size

    def is_ordinal(self, knob: str) -> bool:
        """Whether the order of a knob's values means something."""
        return KNOBS[knob].type in (int, float)

    def normalised(self, point: Mapping[str, Any], base: EngineConfig) -> dict[str, Any]:
        """The point with the values of `base` for knobs that do nothing at it."""
        governing = {**{rule.by: getattr(base, rule.by) for rule in GOVERNED.values()}, **point}
        return {
            name: value if idle_because(name, governing) is None else getattr(base, name)
            for name, value in point.items()
        }

    def config_of(self, point: Mapping[str, Any], base: EngineConfig) -> EngineConfig:
        """The engine config at a point of the space; other knobs as in `base`.

        A speculative method gets the model that is known for it.

        Raises:
            ConfigError: the knobs of this point contradict each other.
        """
        changes = self.normalised(point, base)
        method = changes.get("speculative_method", base.speculative_method)
        if method in MODEL_METHODS:
            changes["speculative_model"] = folder_for(method, base)
        return base.replace(**changes)

    def point_of(self, config: EngineConfig) -> dict[str, Any] | None:
        """The point at which a config lies; None if one of its values is not in the space."""
        point = {name: getattr(config, name) for name in self.values}
        inside = all(value in self.values[name] for name, value in point.items())
        return point if inside else None

    def point_in(self, config: Mapping[str, Any], base: EngineConfig) -> dict[str, Any] | None:
        """The point of a trial's config, whose other knobs are those of `base`."""
        return self.point_of(EngineConfig.from_mapping({**base.to_dict(), **config}))

    def idle(self, knob: str, values: Mapping[str, Any]) -> bool:
        """Whether a knob does nothing beside these values of others."""
        return idle_because(knob, values) is not None

    def nearest(self, config: EngineConfig) -> SearchSpace:
        """The space widened by the values of `config`, so that it is itself a point.

        Knobs that do nothing at any of its points are left out.
        """
        widened = {}
        for name, values in self.values.items():
            if name in GOVERNED and not self._may_matter(name, config):
                continue
            value = getattr(config, name)
            merged = values if value in values else (*values, value)
            widened[name] = _in_order(merged) if self.is_ordinal(name) else tuple(merged)
        return SearchSpace(widened)

    def _may_matter(self, knob: str, config: EngineConfig) -> bool:
        """Whether a governed knob does anything at some point, `config` being one of them."""
        governed = GOVERNED[knob]
        known = (getattr(config, governed.by), *self.values.get(governed.by, ()))
        return any(value in governed.among for value in known)

    def seeds(self, default: EngineConfig) -> list[tuple[str, dict[str, Any]]]:
        """Points to measure before the sampler is asked, with the reason of each.

        The default comes first. Each other one moves one knob to an end of its list (or to each
        other choice), dearest reload first, so that a short budget sees the largest effects. Of the
        quantizations only one of each speed is among them: see `methods_offered`.
        """
        start = self.point_of(default)
        assert start is not None, "the space is widened by the default first"
        seeds = [("default", dict(start))]
        names = sorted(
            self.values, key=lambda n: (KNOBS[n].reload != "weights", n != "max_num_seqs")
        )
        for name in names:
            values = self.values[name]
            ends: Sequence[Any] = values
            if name == "quantization":
                ends = seed_methods(values, start[name])
            elif self.is_ordinal(name):
                ends = (values[0], values[-1])
            seeds += [
                (f"extreme: {name}={_plain(value)}", {**start, name: value})
                for value in dict.fromkeys(ends)
                if value != start[name] and idle_because(name, default.to_dict()) is None
            ]
        return seeds


def load_space(
    device: str,
    narrowing: Mapping[str, Sequence[Any]],
    path: Path | None = None,
    offer: Offer | None = None,
) -> SearchSpace:
    """The space of a device type, from `search_spaces/<device>.yaml` or from a user's file.

    `narrowing` replaces the values of single knobs. A knob with a single value is not searched.
    Of the knobs in `offer` only the values there can be chosen: the space that is shipped lists
    what some device runs fast, and a user who names another value is told.

    Raises:
        BadInput: the file or the narrowing names an unknown knob, one that has no effect on this
            device, or a value that the engine refuses or that is not offered here.
    """
    source = path if path is not None else resources.files("search_spaces") / f"{device}.yaml"
    try:
        raw = safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"search space {source} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise BadInput(f"search space {source} must map knobs to lists of values")
    values: dict[str, tuple[Any, ...]] = {}
    for name, choices in {**raw, **narrowing}.items():
        where = "the command line" if name in narrowing else str(source)
        checked = _checked(name, choices, device, where)
        if offer is not None and name in offer.values:
            if name in narrowing or path is not None:
                offer.check(name, checked, where)
            checked = tuple(v for v in checked if v in offer.values[name])
        if len(checked) > 1:
            values[name] = checked
    return SearchSpace(values)


def _checked(name: Any, choices: Any, device: str, where: str) -> tuple[Any, ...]:
    searchable = [k.name for k in KNOBS.values() if k.tunable and device in k.devices]
    if name not in searchable:
        near = difflib.get_close_matches(str(name), searchable, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it may choose {', '.join(searchable)}"
        raise BadInput(
            f"{where}: {name!r} is not a knob that a search on {device} may choose{hint}"
        )
    if not isinstance(choices, (list, tuple)) or not choices:
        raise BadInput(f"{where}: {name} must list at least one value, got {choices!r}")
    accepted = []
    for value in dict.fromkeys(choices):
        try:
            probe = EngineConfig.from_mapping({**_ROOM.get(name, _ROOM_FOR_MANY), name: value})
        except ConfigError as error:
            raise BadInput(f"{where}: {error}") from error
        accepted.append(getattr(probe, name))
    ordinal = KNOBS[name].type in (int, float)
    return tuple(sorted(accepted)) if ordinal else tuple(accepted)


def _in_order(values: Sequence[Any]) -> tuple[Any, ...]:
    """Numbers in increasing order, after None, with which the engine chooses for itself."""
    return tuple(sorted(values, key=lambda value: (value is not None, value or 0)))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
