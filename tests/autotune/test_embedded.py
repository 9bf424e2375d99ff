"""The embedded models: loadable by others, small enough, and trained enough to mean something."""

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotune.embedded import DRAFT, HELD_OUT, TARGET

WINDOW = 512
FOLDER = HELD_OUT.parent


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)


@cache
def model(folder: Path) -> Any:
    # Not every CPU multiplies bf16: some take twenty times as long for it as for float32.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def held_out_tokens() -> torch.Tensor:
    ids = tokenizer()(HELD_OUT.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def losses(folder: Path, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Nats of each predicted token, `[windows, window]`, over disjoint windows of `tokens`."""
    count = (len(tokens) - 1) // window
    inputs = tokens[: count * window].view(count, window)
    targets = tokens[1 : count * window + 1].view(count, window)
    rows = []
    for some_inputs, some_targets in zip(inputs.split(8), targets.split(8), strict=True):
        logits = model(folder)(input_ids=some_inputs, use_cache=False).logits.float()
        rows.append(F.cross_entropy(logits.transpose(1, 2), some_targets, reduction="none"))
    return torch.cat(rows)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Entropy in nats of the slice's own token frequencies: the best that counting can do on it."""
    share = torch.bincount(tokens).double() / len(tokens)
    return float(-(share * share.clamp_min(1e-300).log()).sum())


def test_both_models_fit_in_25_megabytes() -> None:
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 25_000_000
    assert 9e6 < model(TARGET).num_parameters() < 12e6
    assert model(TARGET).num_parameters() / model(DRAFT).num_parameters() > 8


def test_target_and_draft_share_one_vocabulary() -> None:
    assert (TARGET / "tokenizer.json").read_bytes() == (DRAFT / "tokenizer.json").read_bytes()
    target, draft = (json.loads((f / "config.json").read_text()) for f in (TARGET, DRAFT))
    assert target["vocab_size"] == draft["vocab_size"] == len(tokenizer()) == 4096
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert target[key] == draft[key]
    assert tokenizer().bos_token_id == target["bos_token_id"]
    assert tokenizer().eos_token_id == target["eos_token_id"]
    assert tokenizer().pad_token_id == target["pad_token_id"]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert ids[0] == tokenizer().bos_token_id
    assert tokenizer().decode(ids[1:]) == text


def test_held_out_text_survives_the_tokenizer_and_is_compressed_by_it() -> None:
    text = HELD_OUT.read_text(encoding="utf-8")
    assert tokenizer().decode(held_out_tokens(), skip_special_tokens=True) == text
    assert len(text.encode()) / len(held_out_tokens()) > 3.0


def test_chat_template_puts_the_question_before_the_answer() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompt = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin_of_text|>System: Be brief.\n\nUser: Why?\n\nAssistant:"


@pytest.mark.parametrize(("folder", "share"), [(TARGET, 0.6), (DRAFT, 0.7)])
def test_held_out_loss_is_far_under_the_unigram_entropy(folder: Path, share: float) -> None:
    tokens = held_out_tokens()[: 16 * WINDOW + 1]
    loss = float(losses(folder, tokens, WINDOW).mean())
    assert loss < share * unigram_entropy(tokens)
    # The same tokens out of order: a model that had learned frequencies alone would not notice.
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert float(losses(folder, tokens[order], WINDOW).mean()) > 1.5 * loss


@pytest.mark.parametrize("folder", [TARGET, DRAFT])
def test_loss_does_not_grow_with_the_context(folder: Path) -> None:
    tokens = held_out_tokens()[: 8 * 2048 + 1]
    near = losses(folder, tokens, WINDOW).mean()
    # The same tokens, three quarters of them at positions beyond the short window.
    far = losses(folder, tokens, 2048).mean()
    assert float(far) < 1.05 * float(near)


def test_the_recorded_losses_come_out_again() -> None:
    recorded = json.loads((FOLDER / "training.json").read_text())["measured"]["held_out"]
    for name, folder in (("target", TARGET), ("draft", DRAFT)):
        loss = float(losses(folder, held_out_tokens(), WINDOW).mean())
        expected = recorded[f"{name}_window_{WINDOW}"]["nats_per_token"]
        assert loss == pytest.approx(expected, rel=0.01)


def test_the_card_states_the_recorded_numbers() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    record = json.loads((FOLDER / "training.json").read_text())
    measured = record["measured"]
    for row in measured["held_out"].values():
        assert f"{row['perplexity']:.2f}" in card
        assert f"{row['bits_per_byte']:.3f}" in card
    for name in ("target", "draft"):
        assert f"{record[name]['step']:,} steps" in card
    assert f"{measured['top1_agreement']:.1%}" in card
    assert f"{measured['greedy_speculation']['accepted_per_round']:.2f}" in card


@torch.no_grad()
def test_the_draft_often_guesses_what_the_target_writes() -> None:
    prompts = held_out_tokens()[1 : 8 * 96 + 1].view(8, 96)
    written = model(TARGET).generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
    )
    guessed = model(DRAFT)(input_ids=written[:, :-1], use_cache=False).logits.argmax(-1)[:, 95:]
    assert float((guessed == written[:, 96:]).float().mean()) > 0.4


def test_importing_the_paths_loads_no_framework() -> None:
    program = "import sys, autotune.embedded; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_entropy_of_the_uniform_distribution() -> None:
    assert unigram_entropy(torch.arange(64)) == pytest.approx(math.log(64))
