"""Runs that tuned another engine itself: its winner as that engine's own settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.deploy.redaction import redacted
from autotune.deploy.serving_engine import load_serving_engine
from autotune.deploy.translation import Entry, LeftOut, Translation
from autotune.external.flags import flags_of, idle_knobs
from autotune.external.table import Device, EngineTable, Value, load_table
from engine.config import EngineConfig
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MeasuredEngine:
    """The engine that a run tuned by starting it.

    Arguments:
        name: `vllm` and so on.
        version: the release that was measured; empty if it is not known.
        model: what it loaded; empty if a command elsewhere decided that.
        served_name: the name under which it answered.
        device: where it ran.
        extra: further arguments that the person gave.
        values: the values of its knobs that it was started with.
    """

    name: str
    version: str
    model: str
    served_name: str
    device: Device
    extra: tuple[str, ...]
    values: Mapping[str, Value]

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> MeasuredEngine | None:
        """The engine of a run, by the content of `run.json`; None for the bundled one."""
        told = run.get("engine")
        if not told:
            return None
        chosen = (run.get("result") or {}).get("winner_config") or {}
        values = {**(told.get("fixed") or {}), **chosen}
        return cls(
            name=told["name"],
            version=told.get("version") or "",
            model=told.get("model") or "",
            served_name=told.get("served_name") or "",
            device=told["device"],
            extra=tuple(told.get("extra_arguments") or ()),
            values={name: value for name, value in values.items() if value is not None},
        )

    @property
    def table(self) -> EngineTable:
        """How it is started and tuned."""
        return load_table(self.name)

    def as_bundled(self) -> EngineConfig:
        """The same values where the bundled engine has a knob of the same meaning."""
        config = EngineConfig(model=self.model)
        for name, value in self.values.items():
            knob = self.table.knobs.get(name)
            if knob is None or knob.same_as is None:
                continue
            try:
                config = EngineConfig.from_mapping(config.to_dict() | {knob.same_as: value})
            except ConfigError:
                continue  # a value that the bundled engine has not
        return config

    def translation(self, model: str) -> Translation:
        """The values in the engine's own keys, as they were measured; nothing is translated."""
        entries = [Entry("model", load_serving_engine(self.name).model_key, model)]
        lost = []
        idle = idle_knobs(self.table, self.values, self.device)
        for name, value in self.values.items():
            knob = self.table.knobs[name]
            if name in idle or value == knob.absent:
                continue
            if knob.request_field is not None:
                reason = f"each request has to carry it, as {knob.request_field}"
                lost.append(LeftOut(name, value, reason))
                continue
            if knob.member is not None and knob.flag is not None:
                entries.append(Entry(name, knob.flag.lstrip("-"), value, member=knob.member))
                continue
            given = flags_of(self.table, {name: value}, self.device)
            for variable, text in given.environment.items():
                entries.append(Entry(name, variable, text, place="environment"))
            if given.arguments:
                key = given.arguments[0].lstrip("-")
                # A flag that stands alone; otherwise the value that follows it.
                entries.append(Entry(name, key, True if len(given.arguments) == 1 else value))
        return Translation(tuple(entries), tuple(lost), ())

    def warnings(self) -> tuple[str, ...]:
        """What a person should know of deploying it elsewhere."""
        if not self.extra:
            return ()
        extra = redacted(shlex.join(self.extra))
        return (f"it was measured with further arguments, to be added: {extra}",)
