"""What a search must know of a model before it is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autotune.embedded import TARGET
from engine.config import EngineConfig

# Enough of each end of a shard to tell versions of a model apart without reading all of it.
_FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of a model folder; `max_model_len` in tokens is the engine's limit under the config.

    `quantization` is how the checkpoint's weights are quantized, for people; None: they are not.
    `fingerprint` is a SHA-256 over config.json and the size and both ends of every weights file.
    """

    path: str
    name: str
    architecture: str
    parameters: int
    vocab_size: int
    max_model_len: int
    fingerprint: str
    quantization: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def with_default_model(config: EngineConfig) -> EngineConfig:
    """The same config with the embedded model if none was named, and with absolute paths.

    What is written from it, `deploy/engine.yaml` above all, then works from any folder.
    """
    paths = {
        "model": config.model or str(TARGET),
        "tokenizer": config.tokenizer,
        "speculative_model": config.speculative_model,
    }
    absolute = {
        name: str(Path(path).expanduser().resolve())
        for name, path in paths.items()
        if path is not None and Path(path).expanduser().exists()
    }
    return config.replace(**{**paths, **absolute})


def read_model_info(config: EngineConfig) -> ModelInfo:
    """Read a model folder's facts.

    Raises:
        engine.errors.ModelError: no such folder, a broken one, or an unsupported architecture or
            quantization.
    """
    # They bring torch along, which a router of replicas is better off without.
    from engine.checkpoints.model_folder import open_model_folder
    from engine.checkpoints.open_source import open_source
    from engine.models.registry import decoder_spec

    folder = open_model_folder(config.model)
    spec = decoder_spec(folder)
    names = folder.config.get("architectures") or [folder.config.get("model_type", "unknown")]
    limit = spec.max_position
    path = folder.path.resolve()
    return ModelInfo(
        path=str(path),
        name=model_name(path),
        architecture=str(names[0]),
        parameters=spec.num_parameters,
        vocab_size=spec.vocab_size,
        max_model_len=min(limit, config.max_model_len) if config.max_model_len else limit,
        fingerprint=_fingerprint(path, folder.config),
        quantization=open_source(folder).quantization,
    )


def model_name(path: Path) -> str:
    """What people call the model in a folder, whose path must be absolute."""
    if path == TARGET.resolve():
        return "embedded"
    # A snapshot of the hub's cache is named by its commit; the model's name is two folders up.
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def _fingerprint(path: Path, config: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for shard in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        size = shard.stat().st_size
        digest.update(f"{shard.name}:{size}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
