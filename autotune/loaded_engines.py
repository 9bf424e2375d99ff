"""Engines of one model, one for each set of its weights."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import LoadedModel, load_model


class LoadedEngines:
    """Loads weights when they are first asked for; `close` gives all memory back.

    Args:
        keep: whether to keep weights while others are used. Without it those before are unloaded,
            as there may be no room for two.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._loaded: dict[str, tuple[LoadedModel, Engine]] = {}

    def loaded(self, config: EngineConfig) -> LoadedModel:
        """The model with the weights of a config."""
        return self._of(config)[0]

    def engine(self, config: EngineConfig) -> Engine:
        """An idle engine with this config."""
        engine = self._of(config)[1]
        now = engine.config
        changes = {n: v for n, v in config.to_dict().items() if v != getattr(now, n)}
        if changes:
            engine.reconfigure(**changes)
        return engine

    def close(self) -> None:
        """Unload all models."""
        for loaded, _ in self._loaded.values():
            loaded.close()
        self._loaded.clear()

    def _of(self, config: EngineConfig) -> tuple[LoadedModel, Engine]:
        key = config.quantization
        if key not in self._loaded:
            if not self._keep:
                self.close()
            loaded = load_model(config)
            self._loaded[key] = (loaded, loaded.engine(config))
        return self._loaded[key]
