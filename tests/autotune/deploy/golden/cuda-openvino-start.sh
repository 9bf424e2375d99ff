#!/usr/bin/env bash
# Configuration of OpenVINO Model Server 2026.3.1. Use: bash start.sh
# The keys were read in the source of OpenVINO Model Server 2026.3.
# WARNING: this was measured with autotune's bundled engine, not with OpenVINO Model Server. The
# choice is where to start from; a gain named below was not measured on OpenVINO Model Server.
# Measure there before relying on it.
# It serves on Intel's processors and GPUs; --target_device says which.
# The first command writes graph.pbtxt beside the model, which the server then reads.
#
# Hardware: Example GPU, 16 CPU cores
# HOST, PORT and MODEL may be set; further options go to the engine.
set -euo pipefail
model=${MODEL:-example-openvino}
flags=(
  # measured with auto: or GPU, an Intel one
  --target_device CPU
  # measured with int8: it had a scale for each head of each token; OpenVINO has one for groups of
  #   them
  --kv_cache_precision u8
  # left to the engine when measured; this is what it came to
  # 20.00 GiB when measured, in whole GiB here
  --cache_size 20
  --enable_prefix_caching true
  --max_num_seqs 256
  --max_num_batched_tokens 8192
  --dynamic_split_fuse false
)
ovms --configure --model_path "$model" --task text_generation "${flags[@]}"
exec ovms --model_path "$model" --model_name "${model##*/}" --rest_bind_address "${HOST:-127.0.0.1}" --rest_port "${PORT:-8000}" "$@"

# Not carried over: these shaped what was measured and OpenVINO Model Server has no such key.
# - seed: 0: OpenVINO Model Server has no seed of the server; give requests one each
# - quantization: int4: measured as weight-only int4 in groups; export with --weight-format int4
# - block_size: 8: OpenVINO decides it by the device
# - batching_mode: static: OpenVINO only batches continuously
# - speculative_method: medusa: OpenVINO serves no Medusa heads; an EAGLE-3 head
#     (--draft_eagle3_mode) it does
# - speculative_model: models/heads: these heads go with Medusa, which OpenVINO does not serve
# - num_speculative_tokens: 24: with OpenVINO a request says it, num_assistant_tokens (24 were
#     drafted)
# - speculative_adaptive: true: with OpenVINO a request says it: assistant_confidence_threshold
#     drafts until a draft model is unsure

# Needing no key in OpenVINO Model Server:
# - dtype: auto: the exported model decides it
# - tensor_parallel_size: 1: OpenVINO too takes one device by default
# - cuda_graphs: true: OpenVINO has no CUDA graphs
# - long_prefill_token_threshold: 0: OpenVINO too sets no limit for one request
# - scheduling_policy: fcfs: OpenVINO too serves first come, first served
# - max_queue_delay: 0.05: belongs to dynamic batching, which OpenVINO has not
# - watermark: 0.0: OpenVINO too holds no blocks back
# - prompt_lookup_min: 2: has no effect while speculative_method is medusa
# - prompt_lookup_max: 4: has no effect while speculative_method is medusa
# - prompt_lookup_window: 0: has no effect while speculative_method is medusa
# - gpu_memory_utilization: 0.9: its memory is converted through bytes: see cache_size
