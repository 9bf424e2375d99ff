"""Two GPUs serve as one does, with NCCL and CUDA graphs; nothing to see on other machines."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import EngineError
from engine.parallel_driver import DriverRanks
from engine.quantize.quality import score_text
from tests.engine.tiny_models import make_tiny

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROMPTS = [[5, 4, 3, 2, 1], list(range(40)), [7] * 11]
KNOBS = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 96, "max_num_seqs": 8}


def test_two_gpus_serve_as_one_until_a_rank_is_killed(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path, hidden_size=256, head_dim=64, intermediate_size=512)
    whole, divided = (
        LLM(str(tmp_path), tensor_parallel_size=size, kv_cache_memory_bytes=1 << 26, **KNOBS)
        for size in (1, 2)
    )
    text = torch.randint(0, 128, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    scores = [score_text(x._loaded.runner.decoder, text, 80, 79) for x in (whole, divided)]
    chances = [score.log_probs.exp() for score in scores]
    assert float((chances[0] - chances[1]).abs().max()) < 0.1  # what bfloat16 leaves
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    for graphs in (True, False):
        divided.reconfigure(cuda_graphs=graphs)
        outputs = [out.outputs[0].token_ids for out in divided.generate(PROMPTS, sampling)]
        assert [len(tokens) for tokens in outputs] == [20, 20, 20]

    ranks = divided._loaded.runner.decoder.ranks
    assert isinstance(ranks, DriverRanks)
    os.kill(ranks.workers.pids()[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="rank 1 of 2"):
        divided.generate(PROMPTS, sampling)
    assert time.monotonic() - began < 30.0
    divided.close()
    assert whole.generate(PROMPTS, sampling)  # the process and its GPU are well
