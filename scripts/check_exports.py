"""Gives random configurations, exported, to the engines' own parsers.

Each engine lives in an environment of its own; name its interpreter, or llama.cpp's server:

    python scripts/check_exports.py --vllm VENV/bin/python --model FOLDER
    python scripts/check_exports.py --sglang VENV/bin/python --lmdeploy VENV/bin/python
    python scripts/check_exports.py --openvino VENV/bin/python
    python scripts/check_exports.py --llamacpp BUILD/bin/llama-server

vLLM also checks some configurations as a whole, for which it reads the model's folder. Exits with
1 if anything is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from autotune.deploy.engine_launch import launch_words
from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import load_serving_engine
from autotune.deploy.serving_yaml import render_serving_yaml
from autotune.deploy.translate import translate
from engine.config import KNOBS, MODEL_METHODS, EngineConfig, Knob
from engine.errors import ConfigError

PROBE = Path(__file__).with_name("export_probe.py")
DEVICES = {
    "vllm": "cpu",
    "sglang": "cuda",
    "lmdeploy": "cuda",
    "openvino": "cpu",
    "llamacpp": "cpu",
}
FACTS = {
    "kv_cache_memory_bytes": 3 << 30,
    "kv_cache_tokens": 100_000,
    "kv_cache_tokens_unquantized": 60_000,
    "weights_bytes": 300 << 20,
    "device_memory_bytes": 24 << 30,
    "max_model_len": 2048,
}
# Ordinary values of knobs without choices; the ends of their ranges are in the test suite.
VALUES: dict[str, tuple[Any, ...]] = {
    "device": ("auto",),
    "tensor_parallel_size": (1,),
    "tokenizer": (None,),
    "calibration": (None,),
    "max_model_len": (512, 1024, 2048),
    "kv_cache_memory_bytes": (None, 1 << 28, 1 << 30),
    "max_num_seqs": (1, 4, 32, 256),
    "max_num_batched_tokens": (512, 2048, 8192),
    "max_num_queued_reqs": (None, 1, 64),
    "num_speculative_tokens": (1, 3, 8),
    "prompt_lookup_min": (1, 2),
    "prompt_lookup_max": (2, 5),
    "num_threads": (None, 1, 2),
    "seed": (0, 7),
    "long_prefill_token_threshold": (0, 128),
    "prompt_lookup_window": (0, 512),
    # A library of its own that not every environment has.
    "speculative_method": ("none", "ngram", "draft_model", "medusa"),
}


def drawn(knob: Knob, chance: random.Random, model: str) -> Any:
    """A value of one knob."""
    if knob.name in VALUES:
        return chance.choice(VALUES[knob.name])
    if knob.name in ("model", "speculative_model"):
        return model
    if knob.choices is not None:
        return chance.choice(knob.choices)
    if knob.type is bool:
        return chance.random() < 0.5
    return round(chance.uniform(float(knob.minimum or 0), float(knob.maximum or 1)), 2)


def configs(count: int, seed: int, model: str) -> list[EngineConfig]:
    """Valid configurations."""
    chance, found = random.Random(seed), []
    while len(found) < count:
        values = {knob.name: drawn(knob, chance, model) for knob in KNOBS.values()}
        if values["speculative_method"] not in MODEL_METHODS:
            values["speculative_model"] = None
        try:
            found.append(EngineConfig(**values))
        except ConfigError:
            continue
    return found


def cases(
    name: str, chosen: list[EngineConfig], folder: Path, *, whole: bool
) -> list[dict[str, Any]]:
    """The commands of one engine, its config files written to a folder."""
    table, evidence = load_serving_engine(name), Evidence(device=DEVICES[name])
    made = []
    for number, config in enumerate(chosen):
        translation = translate(config, table, evidence.device, FACTS)
        path = None
        if table.file is not None:
            path = folder / f"{number}-{table.file}"
            path.write_text(render_serving_yaml(table, config, evidence, FACTS))
        made.append(
            {
                "words": launch_words(table, translation, file=None if path is None else str(path)),
                "flags": launch_words(table, translation),
                "settings": translation.flags(),
                "whole": whole and number % 5 == 0,
            }
        )
    return made


def ask_python(
    name: str, interpreter: str, made: list[dict[str, Any]], folder: Path
) -> Counter[str]:
    """What the engine's own interpreter says."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(case) + "\n" for case in made))
    done = subprocess.run(
        [interpreter, PROBE, name, path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("CASE ")]
    answers = Counter(json.loads(line).get("problem", "accepted") for line in lines)
    if len(lines) < len(made):
        answers[f"no answer: {done.stderr[-600:]}"] = len(made) - len(lines)
    return answers


def ask_llamacpp(binary: str, made: list[dict[str, Any]]) -> Counter[str]:
    """Whether llama.cpp gets as far as missing the model's file."""
    answers: Counter[str] = Counter()
    for case in made:
        done = subprocess.run(
            [binary, *case["words"][1:]], capture_output=True, text=True, timeout=60, check=False
        )
        said = done.stdout + done.stderr
        accepted = "failed to open GGUF file" in said
        answers["accepted" if accepted else said[-300:]] += 1
    return answers


def main() -> int:
    """Ask every engine that was named."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in DEVICES:
        parser.add_argument(f"--{name}")
    parser.add_argument("--model", default="/no/such/model")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    chosen = configs(options["cases"], options["seed"], options["model"])
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in DEVICES:
            if options[name] is None:
                continue
            whole = Path(options["model"]).exists()
            made = cases(name, chosen, Path(folder), whole=whole)
            if name == "llamacpp":
                answers = ask_llamacpp(options[name], made)
            else:
                answers = ask_python(name, options[name], made, Path(folder))
            for answer, count in answers.most_common():
                print(f"{name}: {count} x {answer}")
            refused += answers.total() - answers["accepted"]
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
