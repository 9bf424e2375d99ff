#!/usr/bin/env bash
# Configuration of llama.cpp b11512. Use: bash start.sh
# The keys were checked against llama.cpp 0c1e57098.
# WARNING: this was measured with autotune's bundled engine, not with llama.cpp. The choice is
# where to start from; a gain named below was not measured on llama.cpp. Measure there before
# relying on it.
#
# Hardware: Example GPU, 16 CPU cores
# HOST and PORT may be set; further options go to the engine.
set -euo pipefail
flags=(
  # one cache for all slots, as when measured; by default each slot has a fixed part of it
  --kv-unified
  # so that /metrics answers
  --metrics
  # measured from models/example; make the file with llama.cpp's convert_hf_to_gguf.py
  #   models/example --outfile example.gguf
  --model example.gguf
  # measured with int8: a scale for each 32 values; it needs flash attention, which is on where it
  #   can be
  --cache-type-k q8_0
  # goes with cache-type-k
  --cache-type-v q8_0
  # llama.cpp counts its cache in tokens, of all slots together
  # left to the engine when measured; this is what it came to
  # as many tokens as 20.00 GiB held when measured
  --ctx-size 160000
  # llama.cpp reuses what a slot held before, and prompts that it keeps in the host's memory
  #   (--cache-ram); slots do not share a prefix at the same time
  --cache-prompt
  --parallel 256
  # ubatch-size is how much of it is computed at once; its buffers grow with it
  --batch-size 8192
  # goes with batch-size
  --ubatch-size 8192
  # measured with static
  --no-cont-batching
)
exec llama-server "${flags[@]}" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"

# Not carried over: these shaped what was measured and llama.cpp has no such key.
# - seed: 0: llama.cpp would give every request without a seed the same one; give requests one
#     each
# - quantization: int4: measured as weight-only int4 in groups. llama.cpp's nearest is a GGUF
#     file in Q4_0 or Q4_K_M (llama-quantize)
# - enable_chunked_prefill: false: llama.cpp always splits prompts by --batch-size
# - speculative_method: medusa: llama.cpp serves no Medusa heads; a smaller model (--spec-type
#     draft-simple) it does
# - speculative_model: models/heads: these heads go with Medusa, which llama.cpp does not serve
# - num_speculative_tokens: 24: it belongs to a method that llama.cpp has not
# - speculative_adaptive: true: it belongs to a method that llama.cpp has not

# Needing no key in llama.cpp:
# - device: auto: llama.cpp runs on the devices that its build is for
# - dtype: auto: the GGUF file decides it
# - tensor_parallel_size: 1: llama.cpp takes the GPUs that it sees; CUDA_VISIBLE_DEVICES narrows
#     them
# - block_size: 8: llama.cpp places single tokens, not blocks
# - cuda_graphs: true: llama.cpp too captures CUDA graphs unless it is told not to
# - long_prefill_token_threshold: 0: llama.cpp too sets no limit for one request
# - scheduling_policy: fcfs: llama.cpp too serves first come, first served
# - max_queue_delay: 0.05: belongs to dynamic batching, which llama.cpp has not
# - watermark: 0.0: llama.cpp too holds nothing back
# - prompt_lookup_min: 2: has no effect while speculative_method is medusa
# - prompt_lookup_max: 4: has no effect while speculative_method is medusa
# - prompt_lookup_window: 0: has no effect while speculative_method is medusa
# - gpu_memory_utilization: 0.9: its memory is converted through bytes: see ctx-size
