"""Writing Medusa heads as a folder that `engine.speculate.medusa_checkpoint` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from engine.models.spec import DecoderSpec
from engine.quantize.shard_writer import disk_errors, write_json
from engine.speculate.medusa_checkpoint import CALIBRATION, HEADS_FILE
from engine.speculate.medusa_heads import MedusaWeights


def write_medusa(
    folder: Path, weights: MedusaWeights, spec: DecoderSpec, base: str, facts: Mapping[str, Any]
) -> None:
    """Write `medusa_lm_head.safetensors` and, last, `config.json`, each at once.

    `base` names the model that the heads were trained for, a model of `spec`; `facts` are what
    else `config.json` is to say, as JSON values. Outputs have the whole vocabulary.

    Raises:
        EnvironmentLacks: the disk is full, or cannot be written.
    """
    config: dict[str, Any] = {
        "model_type": "medusa",
        "base_model_name_or_path": base,
        "medusa_num_heads": len(weights.heads),
        "medusa_num_layers": weights.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        **facts,
    }
    if weights.heads[0].output is None:
        config["version"] = "2"  # Text Generation Inference's word for shared outputs
    if weights.calibration:
        config[CALIBRATION] = [list(row) for row in weights.calibration]
    path = folder / HEADS_FILE
    temporary = path.with_name(f".writing-{path.name}")
    with disk_errors(folder):
        try:
            save_file(_tensors(weights), temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)  # safetensors makes it private; heads are passed on
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        write_json(folder / "config.json", config)


def _tensors(weights: MedusaWeights) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, head in enumerate(weights.heads):
        for depth, layer in enumerate(head.layers):
            tensors[f"{index}.{depth}.linear.weight"] = layer.weight
            if layer.bias is not None:
                tensors[f"{index}.{depth}.linear.bias"] = layer.bias
        if head.output is not None:
            tensors[f"{index}.{len(head.layers)}.weight"] = head.output
    # A file has no word for tensors that are one.
    stored: set[int] = set()
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone() if tensor.data_ptr() in stored else tensor.contiguous()
        stored.add(tensor.data_ptr())
    return tensors
