"""A Hugging Face model folder: its config, its generation defaults and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.gguf.find import find_gguf
from engine.checkpoints.gguf.source import open_gguf
from engine.checkpoints.json_file import read_json_object
from engine.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that was found to hold a `config.json`; weights are looked for when asked for.

    `config` is the content of `config.json`; `generation_config` that of
    `generation_config.json`, empty if there is none. Of a GGUF file, `path` is the file and
    `config` what a `config.json` would say.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def config_path(self) -> Path:
        """Where `config` was read from, for messages."""
        return self.path if self.path.is_file() else self.path / "config.json"

    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output: of the generation config if it names any, else the config.

        Raises:
            ModelError: `eos_token_id` is neither a token id, a list of them nor null.
        """
        for name, values in (
            ("generation_config.json", self.generation_config),
            ("config.json", self.config),
        ):
            value = values.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if any(type(i) is not int for i in ids):
                raise ModelError(
                    f"{self.path / name}: eos_token_id must be a token id or a list of them, "
                    f"got {value!r}"
                )
            return tuple(ids)
        return ()


def open_model_folder(path: str | Path) -> ModelFolder:
    """Open a folder in Hugging Face's layout, or a GGUF file; weights are not touched yet.

    Raises:
        ModelError: no such folder, no or a broken `config.json`, or a GGUF file that is broken or
            one of several.
    """
    folder = Path(path).expanduser()
    if not str(path):
        raise ModelError("no model was given: name the folder of a Hugging Face model")
    if not folder.exists():
        raise ModelError(f"model folder {folder} does not exist: give the path of a local folder")
    gguf = find_gguf(folder)
    if gguf is not None:
        config, _ = open_gguf(gguf)
        return ModelFolder(path=gguf, config=config, generation_config={})
    if not folder.is_dir():
        raise ModelError(
            f"model {folder} is a file: give the folder that holds its config.json, or a .gguf file"
        )
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(
            f"{folder} has no config.json: a Hugging Face model folder holds config.json and "
            "*.safetensors"
        )
    config = read_json_object(config_path)
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    return ModelFolder(path=folder, config=config, generation_config=generation)
