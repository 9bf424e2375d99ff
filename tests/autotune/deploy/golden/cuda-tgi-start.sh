#!/usr/bin/env bash
# Configuration of Text Generation Inference 3.3.7. Use: bash start.sh
# The keys were read in the source of Text Generation Inference 3.3.7.
# WARNING: this was measured with autotune's bundled engine, not with Text Generation Inference.
# The choice is where to start from; a gain named below was not measured on Text Generation
# Inference. Measure there before relying on it.
# TGI is in maintenance mode; its own page recommends vLLM, SGLang and llama.cpp.
#
# Hardware: Example GPU, 16 CPU cores
# HOST and PORT may be set; further options go to the engine.
set -euo pipefail
# it needs ATTENTION flashinfer or flashdecoding, which are the default where they run
export PREFIX_CACHING=true
export PREFILL_CHUNKING=false
flags=(
  # by default TGI refuses what exceeds 128 requests, running and waiting together
  --max-concurrent-requests 4096
  --model-id models/example
  --num-shard 1
  # TGI does not start if its memory holds fewer
  # left to the engine when measured; this is what it came to
  # 20.00 GiB when measured hold so many tokens in the model's own type
  --max-batch-total-tokens 80000
  --max-batch-size 256
  # in TGI prompt tokens of a step; decodes come on top
  --max-batch-prefill-tokens 8192
)
exec text-generation-launcher "${flags[@]}" --hostname "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"

# Not carried over: these shaped what was measured and Text Generation Inference has no such
# key.
# - seed: 0: TGI has no seed of the server; give requests one each
# - quantization: int4: measured as weight-only int4 in groups, made at load time. TGI has no
#     such online method; make a 4-bit checkpoint first (GPTQ or AWQ) and set --model-id to it
# - kv_cache_dtype: int8: TGI has no int8 cache; --kv-cache-dtype fp8_e4m3fn takes as little
#     memory
# - block_size: 8: the environment variable ATTENTION decides it (flashinfer 1, paged 16,
#     flashdecoding 256)
# - batching_mode: static: TGI only batches continuously
# - speculative_method: medusa: TGI takes Medusa heads in the format of its own speculators,
#     named by the model's folder; set --model-id to such a folder
# - speculative_model: models/heads: TGI takes no draft model, and Medusa heads from the model's
#     folder only
# - num_speculative_tokens: 24: it belongs to a method that does not carry over
# - speculative_adaptive: true: it belongs to a method that does not carry over

# Needing no key in Text Generation Inference:
# - device: auto: TGI runs on the device that its image is for
# - dtype: auto: TGI too takes the checkpoint's type
# - cuda_graphs: true: TGI too captures CUDA graphs, of batches up to 32, unless it is told not
#     to
# - long_prefill_token_threshold: 0: TGI too sets no limit for one request
# - scheduling_policy: fcfs: TGI too serves first come, first served
# - max_queue_delay: 0.05: belongs to dynamic batching, which TGI has not
# - watermark: 0.0: TGI reserves the blocks of a request's whole output when it admits it
# - prompt_lookup_min: 2: has no effect while speculative_method is medusa
# - prompt_lookup_max: 4: has no effect while speculative_method is medusa
# - prompt_lookup_window: 0: has no effect while speculative_method is medusa
# - gpu_memory_utilization: 0.9: its memory is converted through bytes: see
#     max-batch-total-tokens
