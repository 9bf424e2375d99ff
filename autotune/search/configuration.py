"""What searches have in common, whatever engine they tune: configurations, and spaces of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar


class Configuration(Protocol):
    """What a trial measures: the bundled engine's config, or the flags of another engine."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        ...


C = TypeVar("C", bound=Configuration)
_C_contra = TypeVar("_C_contra", bound=Configuration, contravariant=True)


class Space(Protocol[_C_contra]):
    """What a study must know of a space; `autotune.search.space.SearchSpace` is one."""

    @property
    def values(self) -> Mapping[str, tuple[Any, ...]]:
        """Values to try by knob."""
        ...

    def is_ordinal(self, knob: str) -> bool:
        """Whether the order of a knob's values means something."""
        ...

    def normalised(self, point: Mapping[str, Any], base: _C_contra) -> dict[str, Any]:
        """The point with the values of `base` for knobs that do nothing at it."""
        ...

    def point_in(self, config: Mapping[str, Any], base: _C_contra) -> dict[str, Any] | None:
        """The point of a trial's config; None if it is not in the space."""
        ...

    def idle(self, knob: str, values: Mapping[str, Any]) -> bool:
        """Whether a knob does nothing beside these values of others."""
        ...
