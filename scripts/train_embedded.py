"""Train the embedded default models: the target, then its draft, from text to finished folders.

    python scripts/train_embedded.py --output embedded-training --compile

reads the running interpreter's standard library, or each `--text` folder of `.py` and `.rst` files;
the first run writes the tokenizer and the held-out text, and a repeated run with `--resume` goes on
from the last checkpoint. `training.json` in the output holds every number of the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_training import corpus, measure
from embedded_training.llama import (
    DRAFT_SHAPE,
    TARGET_SHAPE,
    Llama,
    LlamaShape,
    read_checkpoint,
    write_checkpoint,
)
from embedded_training.loop import (
    Objective,
    Progress,
    Schedule,
    distillation_loss,
    next_token_loss,
    train,
)
from tokenizers import Tokenizer


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` explains each option."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, action="append", help="folder of text, repeatable")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--minutes", type=float, default=45.0, help="for the target")
    parser.add_argument("--draft-minutes", type=float, default=12.0, help="for the draft")
    parser.add_argument("--steps", type=int, help="end both by step count, reproducibly, instead")
    parser.add_argument("--step-tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--peak", type=float, default=1.0, help="scale of the learning rates")
    parser.add_argument(
        "--distil-from",
        type=float,
        default=0.5,
        help="share of the draft's run after which the target teaches it; 1 for never",
    )
    parser.add_argument("--prose-repeats", type=int, default=2, help="weight of prose over code")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a compiler)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--stage", choices=["all", "target", "draft", "measure"], default="all", help="what to do"
    )
    return parser.parse_args()


class Text:
    """The corpus in tokens: the training stream, the shuffled held-out stream and the excerpt."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folders = arguments.text or [Path(sysconfig.get_path("stdlib"))]
        documents = corpus.cap_tests(corpus.read_documents(folders))
        training = [d for d in documents if not d.held_out]
        held_out = [d for d in documents if d.held_out]
        if not training or not held_out:
            raise SystemExit(f"too little text under {', '.join(map(str, folders))}")
        output: Path = arguments.output
        output.mkdir(parents=True, exist_ok=True)
        stored = output / "target" / "tokenizer.json"
        if stored.exists():
            self.tokenizer = Tokenizer.from_file(str(stored))
        else:
            self.tokenizer = corpus.train_tokenizer(
                (d.text for d in training), TARGET_SHAPE.vocab_size
            )
        for name, shape in (("target", TARGET_SHAPE), ("draft", DRAFT_SHAPE)):
            corpus.write_tokenizer(self.tokenizer, output / name, shape.max_position_embeddings)
        self.excerpt = corpus.held_out_excerpt(held_out)
        (output / "held_out.txt").write_text(self.excerpt, encoding="utf-8")
        repeats = [arguments.prose_repeats if d.kind == "prose" else 1 for d in training]
        self.train = corpus.stream(corpus.encode(self.tokenizer, training), repeats, arguments.seed)
        self.held_out = corpus.stream(
            corpus.encode(self.tokenizer, held_out), [1] * len(held_out), arguments.seed
        )
        self.excerpt_tokens = np.asarray(self.tokenizer.encode(self.excerpt).ids, dtype=np.uint16)
        self.summary = {
            "files": len(training),
            "held_out_files": len(held_out),
            "characters": {
                kind: sum(len(d.text) for d in training if d.kind == kind)
                for kind in ("code", "test", "prose")
            },
            "prose_repeats": arguments.prose_repeats,
            "stream_tokens": len(self.train),
            "held_out_tokens": len(self.held_out),
            "excerpt_bytes": len(self.excerpt.encode()),
            "excerpt_tokens": len(self.excerpt_tokens),
        }


def train_model(
    name: str, shape: LlamaShape, text: Text, schedule: Schedule, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train the model `name` into its folder; returns its shape, size, progress and losses."""
    folder: Path = arguments.output / name
    state = arguments.output / f"{name}.progress.json"
    torch.manual_seed(arguments.seed)
    if arguments.resume and state.exists():
        model, progress = read_checkpoint(shape, folder), Progress(**json.loads(state.read_text()))
    else:
        model, progress = Llama(shape), Progress()
    specials = corpus.special_ids(text.tokenizer)

    def save(reached: Progress) -> None:
        write_checkpoint(model, folder, specials)
        reached.write(state)

    save(progress)
    stages: list[tuple[float, Objective]] = [(0.0, next_token_loss(model))]
    if name == "draft":
        # The teacher costs several times what the student does, so it is asked once the student
        # knows the language.
        teacher = read_checkpoint(TARGET_SHAPE, arguments.output / "target").requires_grad_(False)
        stages.append((arguments.distil_from, distillation_loss(model, teacher)))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters / 1e6:.2f}M parameters", flush=True)
    train(
        model,
        stages,
        text.train,
        schedule,
        seed=arguments.seed,
        validate=lambda: measure.mean_loss(model, text.held_out[:20_000], 512),
        save=save,
        progress=progress,
        compiled=arguments.compile,
    )
    return {"parameters": parameters}


def measure_models(text: Text, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every number of the model card, measured on the stored (bf16) weights and the excerpt."""
    target = read_checkpoint(TARGET_SHAPE, arguments.output / "target")
    draft = read_checkpoint(DRAFT_SHAPE, arguments.output / "draft")
    tokens, size = text.excerpt_tokens, len(text.excerpt.encode())

    def figures(loss: float) -> dict[str, float]:
        return {
            "nats_per_token": round(loss, 4),
            "perplexity": round(math.exp(loss), 2),
            "bits_per_byte": round(measure.bits_per_byte(loss, len(tokens) - 1, size), 4),
        }

    counted = measure.counting_losses(text.train, tokens, TARGET_SHAPE.vocab_size)
    return {
        "held_out": {
            **{
                f"{name}_window_{window}": figures(measure.mean_loss(model, tokens, window))
                for name, model in (("target", target), ("draft", draft))
                for window in (512, 2048)
            },
            **{name: figures(loss) for name, loss in counted.items()},
        },
        "top1_agreement": measure.top1_agreement(target, draft, tokens, 512),
        "greedy_speculation": measure.greedy_acceptance(target, draft, tokens),
    }


def main() -> None:
    """Train and measure as the command line asks."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    text = Text(arguments)
    print(json.dumps(text.summary), flush=True)
    record: dict[str, Any] = {"text": text.summary, "seed": arguments.seed}
    common = {
        "steps": arguments.steps,
        "peak": arguments.peak,
        "step_tokens": arguments.step_tokens,
        "long_step_tokens": arguments.step_tokens,
    }
    plans = {
        "target": (TARGET_SHAPE, Schedule(arguments.minutes, **common)),
        "draft": (
            DRAFT_SHAPE,
            Schedule(arguments.draft_minutes, muon_lr=6e-3, **common),
        ),
    }
    for name, (shape, schedule) in plans.items():
        if arguments.stage in ("all", name):
            train_model(name, shape, text, schedule, arguments)
    if arguments.stage in ("all", "measure"):
        record["measured"] = measure_models(text, arguments)
        for name, (shape, _) in plans.items():
            state = json.loads((arguments.output / f"{name}.progress.json").read_text())
            record[name] = {
                "parameters": sum(p.numel() for p in Llama(shape).parameters()),
                **state,
            }
        (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["measured"], indent=1), flush=True)


if __name__ == "__main__":
    main()
