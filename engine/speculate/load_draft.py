"""Loading a draft model, and whether its tokens are the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.json_file import read_json_object
from engine.checkpoints.model_folder import ModelFolder, open_model_folder
from engine.checkpoints.open_source import open_source
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, EnvironmentLacks
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.models.sharding import check_divides
from engine.models.spec import DecoderSpec
from engine.parallel import ALONE, Ranks


def load_draft(
    config: EngineConfig,
    target_spec: DecoderSpec,
    target_folder: str | Path,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Decoder:
    """The draft model that `config.speculative_model` names, or this rank's part of it.

    Weights are kept as they are stored; what is not quantized is computed in the model's own dtype,
    which is that of `target_spec` unless the config says otherwise.

    Raises:
        ModelError: the folder is missing, broken or of an unsupported architecture.
        ConfigError: the draft has another vocabulary, or the ranks cannot divide it.
        EnvironmentLacks: not enough memory.
    """
    if config.speculative_model is None:
        raise ConfigError("speculative_method=draft_model needs speculative_model, a folder")
    folder = open_model_folder(config.speculative_model)
    spec = decoder_spec(folder)
    check_same_vocabulary(folder, spec, open_model_folder(target_folder), target_spec)
    if ranks.size > 1:
        try:
            check_divides(spec, ranks.size)
        except EngineError as error:
            raise ConfigError(
                f"the draft model {folder.path} cannot be divided as the model is: {error}"
            ) from error
    name = target_spec.checkpoint_dtype if config.dtype == "auto" else config.dtype
    dtype: torch.dtype = getattr(torch, name)
    try:
        return load_decoder(open_source(folder), spec, dtype, device, "none", ranks=ranks)
    except torch.OutOfMemoryError as error:
        raise EnvironmentLacks(
            f"the weights of the draft model {folder.path} do not fit the memory of {device} "
            "beside the model's: choose a smaller one, or another speculative_method"
        ) from error


def check_same_vocabulary(
    draft: ModelFolder, draft_spec: DecoderSpec, target: ModelFolder, target_spec: DecoderSpec
) -> None:
    """Check that a token id means the same to both models.

    Sizes must be equal; where both have a tokenizer.json, its tokens must be.

    Raises:
        ConfigError: they differ; says in what.
        ModelError: a tokenizer.json cannot be read.
    """
    ours, theirs = draft_spec.vocab_size, target_spec.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"the draft model {draft.path} has {ours} tokens and the model {target.path} {theirs}: "
            "choose a draft model of the same vocabulary"
        )
    files = [folder.path / "tokenizer.json" for folder in (draft, target)]
    if not all(file.is_file() for file in files):
        return
    if files[0].read_bytes() == files[1].read_bytes():
        return
    drafted, wanted = (_token_ids(read_json_object(file)) for file in files)
    differing = sorted(
        token for token in drafted.keys() | wanted.keys() if drafted.get(token) != wanted.get(token)
    )
    if differing:
        token = differing[0]
        raise ConfigError(
            f"the draft model {draft.path} and the model {target.path} differ in {len(differing)} "
            f"tokens: {token!r} is {_id(drafted, token)} in the draft's tokenizer.json and "
            f"{_id(wanted, token)} in the model's: choose a draft model of the same vocabulary"
        )


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """The ids of all tokens of a tokenizer.json, those added beside the model's included."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of a Unigram model: pairs of token and score
        ids = {str(entry[0]): index for index, entry in enumerate(vocabulary)}
    else:
        ids = {str(token): int(index) for token, index in vocabulary.items()}
    added = tokenizer.get("added_tokens") or []
    return ids | {str(token["content"]): int(token["id"]) for token in added}


def _id(ids: dict[str, int], token: str) -> str:
    return str(ids[token]) if token in ids else "missing"
