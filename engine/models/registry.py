"""Which architectures are served, and how each one's config is read."""

from __future__ import annotations

from collections.abc import Callable

from engine.checkpoints.model_folder import ModelFolder
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.llama import llama_spec, mistral_spec
from engine.models.spec import DecoderSpec

ARCHITECTURES: dict[str, Callable[[ConfigFields], DecoderSpec]] = {
    "LlamaForCausalLM": llama_spec,
    "MistralForCausalLM": mistral_spec,
}
# A config without `architectures` still names its family.
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def decoder_spec(folder: ModelFolder) -> DecoderSpec:
    """The decoder that a folder's config describes.

    Raises:
        ModelError: an architecture that is not served (named, with those that are), or a config
            with a missing or bad field.
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
            return ARCHITECTURES[name](ConfigFields(folder.config, source))
    raise ModelError(
        f"{source}: architecture {', '.join(map(str, names))} is not supported; supported are "
        f"{', '.join(ARCHITECTURES)}"
    )
