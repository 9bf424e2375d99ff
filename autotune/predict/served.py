"""A configuration with the arithmetic of its model under it."""

from __future__ import annotations

from dataclasses import replace

from autotune.predict.cache_after import Served
from autotune.profiling.schema import ModelFacts
from engine.block_groups import ONE_GROUP, block_groups
from engine.config import EngineConfig
from engine.errors import EngineError


def served(
    config: EngineConfig, base: Served | None = None, model: ModelFacts | None = None
) -> Served | None:
    """What serving under `config` takes, read from the model's folder.

    Where that is not readable any more, `model` stands for it, or what `base` knows as far as the
    change leaves it alone.

    Returns None where nothing is known of it.
    """
    # Reading a model's config knows of tensors, and `autotune --help` must not wait for them.
    from autotune.profiling.model_facts import model_facts
    from engine.checkpoints.model_folder import open_model_folder
    from engine.models.registry import decoder_spec

    try:
        facts = model_facts(config)
        spec = decoder_spec(open_model_folder(facts.path or config.model))
        groups = block_groups(spec.layer_windows, facts.max_model_len)
    except (EngineError, OSError, ValueError):
        if model is not None:
            return Served(config, model, ONE_GROUP, _draft(config))
        if base is None or _other_weights(config, base.config):
            return None
        longest = config.max_model_len or base.model.max_model_len
        return replace(
            base,
            config=config,
            model=base.model.model_copy(update={"max_model_len": longest}),
            draft=_draft(config),
        )
    return Served(config, facts, groups, _draft(config))


def _draft(config: EngineConfig) -> ModelFacts | None:
    """Facts of the model that drafts; None where none does, or it is not readable."""
    from autotune.profiling.model_facts import model_facts

    if config.speculative_method != "draft_model" or config.speculative_model is None:
        return None
    alone = {"speculative_method": "none", "quantization": "none", "max_model_len": None}
    try:
        return model_facts(config.replace(model=config.speculative_model, tokenizer=None, **alone))
    except (EngineError, OSError, ValueError):
        return None


def _other_weights(config: EngineConfig, base: EngineConfig) -> bool:
    names = ("quantization", "kv_cache_dtype", "dtype", "tensor_parallel_size")
    return any(getattr(config, name) != getattr(base, name) for name in names)
