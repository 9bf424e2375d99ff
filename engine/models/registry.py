"""Which architectures are served, and how each one's config is read.

A family is a file in `engine/models/families` that reads its config into a `DecoderSpec`, and an
entry here. Where its decoder does what none does yet, `DecoderSpec` gets a field for it.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.checkpoints.model_folder import ModelFolder
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.families.gemma import gemma2_spec, gemma3_spec, gemma3_text_spec
from engine.models.families.llama import llama_spec
from engine.models.families.mistral import mistral_spec, mixtral_spec
from engine.models.families.phi import phi3_spec
from engine.models.families.qwen import qwen2_spec, qwen3_moe_spec, qwen3_spec
from engine.models.spec import DecoderSpec
from engine.models.unknown_fields import refuse_unknown

ARCHITECTURES: dict[str, Callable[[ConfigFields], DecoderSpec]] = {
    "LlamaForCausalLM": llama_spec,
    "MistralForCausalLM": mistral_spec,
    "MixtralForCausalLM": mixtral_spec,
    "Qwen2ForCausalLM": qwen2_spec,
    "Qwen3ForCausalLM": qwen3_spec,
    "Qwen3MoeForCausalLM": qwen3_moe_spec,
    "Phi3ForCausalLM": phi3_spec,
    "Gemma2ForCausalLM": gemma2_spec,
    "Gemma3ForCausalLM": gemma3_text_spec,
    "Gemma3ForConditionalGeneration": gemma3_spec,
}
# A config without `architectures` still names its family.
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
}


def decoder_spec(folder: ModelFolder) -> DecoderSpec:
    """The decoder that a folder's config describes.

    Raises:
        ModelError: an architecture that is not served (named, with those that are), or a config
            with a missing or bad field, or with one that the family does not have and that would
            change what the model computes.
    """
    source = str(folder.config_path)
    names = folder.config.get("architectures")
    if not names:
        model_type = folder.config.get("model_type")
        names = [_MODEL_TYPES.get(model_type, model_type)] if isinstance(model_type, str) else []
    if not isinstance(names, list) or not names:
        raise ModelError(
            f"{source} names no architecture; supported are {', '.join(ARCHITECTURES)}"
        )
    for name in names:
        if isinstance(name, str) and name in ARCHITECTURES:
            return spec_of(name, folder.config, source)
    raise ModelError(
        f"{source}: architecture {', '.join(map(str, names))} is not supported; supported are "
        f"{', '.join(ARCHITECTURES)}"
    )


def spec_of(architecture: str, config: dict[str, object], source: str) -> DecoderSpec:
    """The decoder that `config`, read from `source`, describes under a served architecture.

    Raises:
        ModelError: as `decoder_spec`.
    """
    fields = ConfigFields(config, source)
    spec = ARCHITECTURES[architecture](fields)
    refuse_unknown(fields, architecture)
    return spec
