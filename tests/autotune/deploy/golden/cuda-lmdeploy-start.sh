#!/usr/bin/env bash
# Configuration of LMDeploy 0.18.0. Use: bash start.sh
# The keys were checked against LMDeploy 0.18.0.
# WARNING: this was measured with autotune's bundled engine, not with LMDeploy. The choice is
# where to start from; a gain named below was not measured on LMDeploy. Measure there before
# relying on it.
# LMDeploy takes its PyTorch engine instead where TurboMind does not know the model; it says so
# at the start.
#
# Hardware: Example GPU, 16 CPU cores
# HOST, PORT and MODEL may be set; further options go to the engine.
set -euo pipefail
model=${MODEL:-models/example}
flags=(
  --dtype auto
  --tp 1
  # measured with int8: int8 with a scale and a zero point for each head of each token
  --quant-policy 8
  # measured with 8: TurboMind takes multiples of 64, of 32 from compute capability 8.0 on
  --cache-block-seq-len 64
  # left to the engine when measured; this is what it came to
  # here it is KV cache / memory free after loading: 20.00 GiB / (80.00 GiB - 16.00 GiB of
  #   weights)
  --cache-max-entry-count 0.312
  --enable-prefix-caching
  --max-batch-size 256
  --max-prefill-token-num 8192
)
exec lmdeploy serve api_server "$model" --backend turbomind "${flags[@]}" --server-name "${HOST:-127.0.0.1}" --server-port "${PORT:-8000}" "$@"

# Not carried over: these shaped what was measured and LMDeploy has no such key.
# - seed: 0: LMDeploy has no seed of the server; give requests one each
# - quantization: int4: LMDeploy serves weights as their checkpoint has them: make a 4-bit
#     checkpoint (AWQ, GPTQ, or compressed-tensors W4A16 by `autotune quantize`) or a blocked
#     FP8 one, and serve that folder
# - batching_mode: static: LMDeploy only batches continuously
# - speculative_method: medusa: TurboMind drafts nothing; LMDeploy's PyTorch engine does with
#     EAGLE and MTP heads
# - speculative_model: models/heads: TurboMind drafts nothing
# - num_speculative_tokens: 24: TurboMind drafts nothing
# - speculative_adaptive: true: TurboMind drafts nothing

# Needing no key in LMDeploy:
# - device: auto: TurboMind runs on NVIDIA GPUs
# - cuda_graphs: true: TurboMind captures no CUDA graphs
# - enable_chunked_prefill: false: it decides which keys max_num_batched_tokens has here
# - long_prefill_token_threshold: 0: LMDeploy too sets no limit for one request
# - scheduling_policy: fcfs: LMDeploy too serves first come, first served
# - max_queue_delay: 0.05: belongs to dynamic batching, which LMDeploy has not
# - watermark: 0.0: LMDeploy too holds no blocks back
# - prompt_lookup_min: 2: has no effect while speculative_method is medusa
# - prompt_lookup_max: 4: has no effect while speculative_method is medusa
# - prompt_lookup_window: 0: has no effect while speculative_method is medusa
# - gpu_memory_utilization: 0.9: its memory is converted through bytes: see
#     cache-max-entry-count
