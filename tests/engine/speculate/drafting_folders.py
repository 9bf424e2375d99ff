"""A tiny model, and whoever can draft for it: a smaller likeness of it, and Medusa heads."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.engine.tiny_llama import make_tiny_llama
from tests.engine.tiny_models import TinyModel

METHODS = ("ngram", "suffix", "draft_model", "medusa")
NUM_HEADS = 3


def letter(token: int) -> str:
    """The text of a token."""
    return chr(ord("a") + token)


@dataclass(frozen=True)
class DraftedFor:
    """A model and the folders of those that draft for it."""

    tiny: TinyModel
    draft: Path
    heads: Path

    def knobs(self, method: str) -> dict[str, Any]:
        """Of an engine that drafts by this method at every step, whether it pays or not."""
        model = {"draft_model": self.draft, "medusa": self.heads}.get(method)
        return {
            "speculative_method": method,
            "speculative_model": None if model is None else str(model),
            "speculative_adaptive": False,
            "num_speculative_tokens": 8 if method == "medusa" else 4,
            "prompt_lookup_min": 1,
            "block_size": 8,
        }


def make_drafted_for(root: Path, vocabulary: int, seed: int, **config: Any) -> DraftedFor:
    """A model whose tokens are so many letters; its drafts are right often, and wrong often."""
    tiny = make_tiny_llama(root / "target", seed, vocab_size=vocabulary, **config)
    letters = Tokenizer(models.WordLevel({letter(i): i for i in range(vocabulary)}, letter(0)))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    letters.save(str(root / "target" / "tokenizer.json"))
    return DraftedFor(tiny, _likeness(tiny, root / "draft"), _heads(tiny, root / "heads"))


def _likeness(tiny: TinyModel, folder: Path) -> Path:
    """The model with noise in its weights."""
    generator = torch.Generator().manual_seed(1)
    like = copy.deepcopy(tiny.model)
    for parameter in like.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.data.std()
        parameter.data += 0.1 * noise.to(parameter.dtype)
    like.save_pretrained(folder)
    return folder


def _heads(tiny: TinyModel, folder: Path) -> Path:
    """Heads whose outputs are fitted, by least squares, to what random texts go on with."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    hidden_size, vocabulary = tiny.model.config.hidden_size, tiny.model.config.vocab_size
    texts = torch.randint(vocabulary, (32, 6), generator=generator)
    texts = tiny.model.generate(
        texts,
        attention_mask=torch.ones_like(texts),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.inference_mode():
        states = tiny.model.model(texts).last_hidden_state[:, 5:].float()
    tensors = {}
    for head in range(NUM_HEADS):
        inputs = states[:, : -(head + 2)].reshape(-1, hidden_size)
        answers = texts[:, 5 + head + 2 :].reshape(-1)
        wanted = torch.nn.functional.one_hot(answers, vocabulary).float() * 8
        fitted = torch.linalg.lstsq(
            inputs.T @ inputs + torch.eye(hidden_size), inputs.T @ wanted
        ).solution
        weight = torch.randn(hidden_size, hidden_size, generator=generator) * 0.01
        tensors[f"{head}.0.linear.weight"] = weight
        tensors[f"{head}.0.linear.bias"] = torch.zeros(hidden_size)
        tensors[f"{head}.1.weight"] = fitted.T.contiguous()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": NUM_HEADS, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
