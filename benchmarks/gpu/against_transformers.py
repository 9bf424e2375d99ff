"""Throughput against transformers' continuous batching: one model, one set of requests."""

from __future__ import annotations

import inspect
import random
import time
from typing import Any

import torch
import transformers

from benchmarks.gpu import model
from benchmarks.gpu.timing import Bench
from engine import SamplingParams
from engine.config import EngineConfig
from engine.models.block import Layer, Mlp
from engine.models.decoder import Decoder
from kernels.ops import pack_dense

REQUESTS, OUTPUT = 128, 96


def compare(bench: Bench) -> dict[str, Any]:
    """Output tokens a second of both; each runs the requests twice, the first time to warm up."""
    config = model.TINY if bench.rehearsal else model.LLAMA_8B
    torch.manual_seed(0)
    with torch.device(bench.device):
        peer = transformers.LlamaForCausalLM._from_config(
            _llama_config(config), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    peer.requires_grad_(False)
    chance = random.Random(0)
    count = 3 if bench.rehearsal else REQUESTS
    longest = 12 if bench.rehearsal else 1024
    output = 4 if bench.rehearsal else OUTPUT
    prompts = [
        [
            chance.randrange(config["vocab_size"])
            for _ in range(chance.randint(longest // 8, longest))
        ]
        for _ in range(count)
    ]
    ours = _ours(bench, peer, prompts, output)
    theirs = _theirs(peer, prompts, output, bench.rehearsal)
    return {
        "model": "Llama 3.1 8B's shape, random weights, bfloat16",
        "requests": count,
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens_each": output,
        "transformers": transformers.__version__,
        "ours_output_tokens_per_s": ours,
        "transformers_generate_batch_output_tokens_per_s": theirs,
        "ratio": ours / theirs,
    }


def _llama_config(config: dict[str, Any]) -> Any:
    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    known.pop("torch_dtype")
    return transformers.LlamaConfig(**known, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def _ours(bench: Bench, peer: Any, prompts: list[list[int]], output: int) -> float:
    spec = model.spec_of(model.TINY if bench.rehearsal else model.LLAMA_8B)
    tensors = peer.state_dict()

    def take(*names: str) -> Any:
        return pack_dense(torch.cat([tensors[f"{name}.weight"] for name in names]))

    layers = []
    for i in range(spec.num_layers):
        root = f"model.layers.{i}"
        attention, mlp = f"{root}.self_attn", f"{root}.mlp"
        layers.append(
            Layer(
                tensors[f"{root}.input_layernorm.weight"],
                take(*(f"{attention}.{x}_proj" for x in "qkv")),
                take(f"{attention}.o_proj"),
                tensors[f"{root}.post_attention_layernorm.weight"],
                Mlp(take(f"{mlp}.gate_proj", f"{mlp}.up_proj"), take(f"{mlp}.down_proj")),
            )
        )
    decoder = Decoder(
        spec,
        take("model.embed_tokens"),
        layers,
        tensors["model.norm.weight"],
        take("lm_head"),
        torch.bfloat16,
        bench.device,
    )
    cache = 1 << 20 if bench.rehearsal else 30 << 30
    config = EngineConfig(
        device=bench.device.type,
        kv_cache_memory_bytes=cache,
        max_num_seqs=8 if bench.rehearsal else 128,
        max_num_batched_tokens=64 if bench.rehearsal else 8192,
        enable_prefix_caching=False,
    )
    engine = model.start_engine(decoder, config, 64 if bench.rehearsal else 2048, [])
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    for number in range(2):
        for index, prompt in enumerate(prompts):
            engine.add(f"{number}-{index}", prompt, sampling)
        start = time.perf_counter()
        tokens = 0
        while engine.has_unfinished:
            tokens += sum(len(result.token_ids) for result in engine.step())
        seconds = time.perf_counter() - start
    return tokens / seconds


def _theirs(peer: Any, prompts: list[list[int]], output: int, rehearsal: bool) -> float:
    options = transformers.GenerationConfig(
        max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    more: dict[str, Any] = {}
    known = inspect.signature(peer.generate_batch).parameters
    if "persistent_manager" in known:
        more["persistent_manager"] = True  # so that its start is in the first run alone, as ours
    if rehearsal and "continuous_batching_config" in known:  # by default it takes all memory
        more["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            num_blocks=4, max_batch_tokens=64
        )
    for _ in range(2):
        start = time.perf_counter()
        results = peer.generate_batch(
            prompts, generation_config=options, progress_bar=False, **more
        )
        seconds = time.perf_counter() - start
    if "persistent_manager" in more:
        peer.destroy_cached_continuous_batching_manager()
    tokens = sum(len(result.generated_tokens) for result in results.values())
    if tokens != len(prompts) * output:
        raise RuntimeError(f"generate_batch gave {tokens} tokens of {len(prompts) * output}")
    return tokens / seconds
