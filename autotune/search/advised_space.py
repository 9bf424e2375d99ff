"""What advice makes of a search: points to begin with, knobs to leave alone, values to add."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.search.methods_offered import Offer, speed_class
from autotune.search.space import SearchSpace
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError
from engine.quantize.method_table import METHODS


@dataclass(frozen=True, slots=True)
class AdvisedSpace:
    """A search space after advice: `fixed` says why a knob is left out, `opened` what was added."""

    space: SearchSpace
    fixed: Mapping[str, str]
    opened: Mapping[str, tuple[Any, ...]]

    @property
    def notes(self) -> list[str]:
        """What a user should know of it, one sentence a knob."""
        fixed = [f"{name} is not searched: {why}" for name, why in self.fixed.items()]
        opened = [
            f"{name} may also be {', '.join(map(_plain, values))}, as is advised"
            for name, values in self.opened.items()
        ]
        return [*fixed, *opened]


def advised_space(
    space: SearchSpace,
    base: EngineConfig,
    advice: Sequence[Mapping[str, Any]],
    irrelevant: Mapping[str, str],
    offer: Offer,
    asked_for: Collection[str],
) -> AdvisedSpace:
    """Narrow and widen a space by what a profile shows.

    A knob that cannot matter stays as the default has it; values that advice sets or opens join the
    others, where this device can run them. Knobs in `asked_for` are the user's: they stay as they
    are, and a knob that the user fixed is not opened.
    """
    opened = {
        name: added
        for name, values in _wanted(advice).items()
        if name not in asked_for
        and (added := _new_values(name, values, space.values.get(name, ()), base, offer))
    }
    advised = {name for item in advice if item["testable"] for name in item["knobs"]}
    fixed = {
        name: why
        for name, why in irrelevant.items()
        if name in space.values and name not in asked_for and name not in advised
    }
    values = {name: known for name, known in space.values.items() if name not in fixed}
    for name, added in opened.items():
        values[name] = (*values.get(name, ()), *added)
    return AdvisedSpace(SearchSpace(values).nearest(base), fixed, opened)


def advised_seeds(
    space: SearchSpace, base: EngineConfig, advice: Sequence[Mapping[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """Points at which each testable piece of advice is followed alone, in the order of the advice.

    Each is a change of the default by itself, so that the scoreboard can tell what it brought.
    Methods of quantization that end in the same kernels are equally fast: the one that needs no
    calibration stands for them, as in `methods_offered`.
    """
    start = space.point_of(base)
    assert start is not None, "the space is widened by the default first"
    seeds: list[tuple[str, dict[str, Any]]] = []
    places: dict[str, int] = {_speed(start): -1}
    for item in advice:
        knobs = item["knobs"]
        if not item["testable"] or any(v not in space.values.get(n, ()) for n, v in knobs.items()):
            continue
        seed = (f"advice: {item['technique']}", {**start, **knobs})
        place = places.setdefault(_speed(seed[1]), len(seeds))
        if place == len(seeds):
            seeds.append(seed)
        elif place >= 0 and _calibrated(seeds[place][1]) and not _calibrated(seed[1]):
            seeds[place] = seed
    return seeds


def _speed(point: Mapping[str, Any]) -> str:
    """What decides how fast a point is: equal for points that run the same kernels alike."""
    method = point.get("quantization")
    return str({**point, "quantization": None if method is None else speed_class(method)})


def _calibrated(point: Mapping[str, Any]) -> bool:
    return METHODS[point.get("quantization", "none")].calibrated


def _wanted(advice: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values that advice sets or opens, by knob."""
    wanted: dict[str, list[Any]] = {}
    for item in advice:
        if not item["testable"]:
            continue
        for name, value in item["knobs"].items():
            wanted.setdefault(name, []).append(value)
        for name, values in item["opens"].items():
            wanted.setdefault(name, []).extend(values)
    return wanted


def _new_values(
    name: str, wanted: Sequence[Any], known: Sequence[Any], base: EngineConfig, offer: Offer
) -> tuple[Any, ...]:
    """Those of the wanted values that are new and that the engine can be set to here."""
    knob = KNOBS.get(name)
    if knob is None or not knob.tunable or base.device not in knob.devices:
        return ()
    offered = offer.values.get(name)
    return tuple(
        value
        for value in dict.fromkeys(wanted)
        if value not in known
        and value != getattr(base, name)
        and (offered is None or value in offered)
        and _accepted(name, value, base)
    )


def _accepted(name: str, value: Any, base: EngineConfig) -> bool:
    try:
        base.replace(**{name: value})
    except ConfigError:
        return False
    return True


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
