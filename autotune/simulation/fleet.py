"""Several engines that share a load: how many, who gets which request, and who computes prompts."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from autotune.errors import BadInput
from engine.server.routing import ROUTERS, Router

MOST_REPLICAS = 10_000


@dataclass(frozen=True, slots=True)
class Disaggregation:
    """Prompts on some engines, decodes on others (Zhong et al. 2024, "DistServe").

    A prompt's first token comes from the engine that computed it. Its keys and values then go over
    that engine's link, one prompt after another, and after `transfer_latency_s` more the request
    decodes on another engine. A prompt is sent whole, whatever of it the receiver may have.

    Args:
        prefill_replicas: engines that compute prompts.
        decode_replicas: engines that go on from them.
        transfer_bytes_per_s: what the link of one of the former carries.
        transfer_latency_s: seconds of a transfer beside those of its bytes.
        kv_bytes_per_token: bytes of a token's keys and values in all layers.

    Raises:
        BadInput: one of them is out of its range.
    """

    prefill_replicas: int
    decode_replicas: int
    transfer_bytes_per_s: float
    transfer_latency_s: float
    kv_bytes_per_token: float

    def __post_init__(self) -> None:
        _check_count("prefill replicas", self.prefill_replicas)
        _check_count("decode replicas", self.decode_replicas)
        if not self.transfer_bytes_per_s > 0:
            raise BadInput(
                "the transfer bandwidth must be above 0 bytes per second, got "
                f"{self.transfer_bytes_per_s:g}"
            )
        for name, value in (
            ("transfer latency", self.transfer_latency_s),
            ("bytes of keys and values per token", self.kv_bytes_per_token),
        ):
            if not 0 <= value < math.inf:
                raise BadInput(f"the {name} must be at least 0 and finite, got {value:g}")

    def link_seconds(self, tokens: int) -> float:
        """Seconds that so many tokens' keys and values take on the link."""
        return tokens * self.kv_bytes_per_token / self.transfer_bytes_per_s


@dataclass(frozen=True, slots=True)
class Fleet:
    """Engines of one configuration behind a router.

    `round_robin` deals requests out in turn. `least_loaded` gives each to the engine with the
    fewest unfinished ones. `prefix_aware` gives it to the engine that has most of its prompt in the
    cache, unless that has too much to do (`engine.server.routing`).

    With disaggregation the router deals out prompts, and decodes go where fewest requests are, or
    in turn with `round_robin`.

    Raises:
        BadInput: no such router, no replicas, or replicas beside a disaggregation.
    """

    replicas: int = 1
    router: Router = "round_robin"
    disaggregation: Disaggregation | None = None

    def __post_init__(self) -> None:
        _check_count("replicas", self.replicas)
        check_router(self.router)
        if self.disaggregation is not None and self.replicas != 1:
            raise BadInput(
                "a disaggregated fleet has its prefill and decode replicas: leave the number of "
                "replicas out"
            )

    @property
    def engines(self) -> int:
        """How many engines there are in all."""
        split = self.disaggregation
        return self.replicas if split is None else split.prefill_replicas + split.decode_replicas

    def __str__(self) -> str:
        split = self.disaggregation
        if split is not None:
            told = f"{split.prefill_replicas} prefill and {split.decode_replicas} decode replicas"
            return f"{told}, {self.router}"
        return "1 replica" if self.replicas == 1 else f"{self.replicas} replicas, {self.router}"


def check_router(name: str) -> Router:
    """The router of this name; dashes and underscores are alike, and `prefix` is short.

    Raises:
        BadInput: there is none; names those that there are.
    """
    wanted = name.strip().lower().replace("-", "_")
    wanted = "prefix_aware" if wanted == "prefix" else wanted
    for router in ROUTERS:
        if router == wanted:
            return router
    near = difflib.get_close_matches(wanted, ROUTERS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BadInput(f"unknown router {name!r}: {hint}there are {', '.join(ROUTERS)}")


def parse_disaggregation(text: str) -> tuple[int, int]:
    """Prefill and decode replicas from `2:1`.

    Raises:
        BadInput: it is not of this form.
    """
    prefill, colon, decode = text.strip().partition(":")
    if not (colon and prefill.isascii() and prefill.isdigit() and decode.isascii()):
        raise _no_ratio(text)
    if not decode.isdigit() or not int(prefill) or not int(decode):
        raise _no_ratio(text)
    return int(prefill), int(decode)


def _no_ratio(text: str) -> BadInput:
    return BadInput(
        f"--disaggregate {text!r} is not a number of prefill and of decode replicas: write for "
        "instance 2:1"
    )


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= MOST_REPLICAS:
        raise BadInput(f"the number of {name} must be between 1 and {MOST_REPLICAS}, got {value}")


ONE = Fleet()

__all__ = [
    "ONE",
    "ROUTERS",
    "Disaggregation",
    "Fleet",
    "Router",
    "check_router",
    "parse_disaggregation",
]
