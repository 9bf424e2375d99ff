#!/usr/bin/env bash
# Configuration of LMDeploy 0.18.0. Use: bash start.sh
# The keys were checked against LMDeploy 0.18.0.
# WARNING: this was measured with autotune's bundled engine, not with LMDeploy. The choice is
# where to start from; a gain named below was not measured on LMDeploy. Measure there before
# relying on it.
# WARNING: this was measured on a CPU and LMDeploy runs on GPUs only: batch sizes, step sizes
# and memory that suit a CPU say little of a GPU. Tune again there.
# LMDeploy takes its PyTorch engine instead where TurboMind does not know the model; it says so
# at the start.
#
# Found by: autotune run --slo 'ttft<200ms,tpot<100ms'
# Started: 2026-03-01T12:00:00+00:00
# Hardware: Example Processor, 2 CPU cores
# Versions: autotune 0.1.0, torch 2.13.0
# Workload: trace.csv at 2.5 requests/s
# Objective: goodput under ttft<200ms,tpot<100ms
# Gain over the default: 1.42x, 95% interval 1.3x to 1.55x, trials 31, 33, 35 against trials 30,
#   32, 34 of the default
# Verdict: max_num_seqs=32 and int8 weights serve 1.42 times the goodput.
# HOST, PORT and MODEL may be set; further options go to the engine.
set -euo pipefail
model=${MODEL:-models/example}
flags=(
  --dtype auto
  --tp 1
  --session-len 2048
  # measured with fp8: TurboMind has no FP8 cache; this is int8 with a scale and a zero point for
  #   each head of each token, and takes as little memory
  --quant-policy 8
  # tuned: default 16; measured in trials 31, 33, 35
  # measured with 8: TurboMind takes multiples of 64, of 32 from compute capability 8.0 on
  --cache-block-seq-len 64
  # tuned: default 256; 71% of what the objective varied by in the search; measured in trials 31,
  #   33, 35
  --max-batch-size 32
  --num-tokens-per-iter 2048
  # as many passes as the longest prompt takes in such chunks
  --max-prefill-iters 1
  # goes with num-tokens-per-iter
  --max-prefill-token-num 2048
)
exec lmdeploy serve api_server "$model" --backend turbomind "${flags[@]}" --server-name "${HOST:-127.0.0.1}" --server-port "${PORT:-8000}" "$@"

# Not carried over: these shaped what was measured and LMDeploy has no such key.
# - seed: 0: LMDeploy has no seed of the server; give requests one each
# - quantization: int8: LMDeploy serves weights as their checkpoint has them: make a 4-bit
#     checkpoint (AWQ, GPTQ, or compressed-tensors W4A16 by `autotune quantize`) or a blocked
#     FP8 one, and serve that folder (tuned: default none; 20% of what the objective varied by
#     in the search; measured in trials 31, 33, 35)
# - kv_cache_memory_bytes: 3221225472: it is a share of a GPU's memory there and this was
#     measured on a CPU, where the KV cache had 3.00 GiB
# - long_prefill_token_threshold: 4096: LMDeploy has no limit for one request
# - scheduling_policy: sjf: LMDeploy serves first come, first served
# - max_num_queued_reqs: 10: LMDeploy's --max-concurrent-requests lets more wait instead of
#     refusing them; put a limit into the proxy before it
# - speculative_method: ngram: TurboMind drafts nothing; LMDeploy's PyTorch engine does with
#     EAGLE and MTP heads (tuned: default none; measured in trials 31, 33, 35)
# - num_speculative_tokens: 8: TurboMind drafts nothing (tuned: default 4; measured in trials
#     31, 33, 35)
# - speculative_adaptive: true: TurboMind drafts nothing
# - prompt_lookup_min: 2: TurboMind drafts nothing
# - prompt_lookup_max: 4: TurboMind drafts nothing
# - prompt_lookup_window: 0: TurboMind drafts nothing
# - num_threads: 2: CPU threads of the engine that was measured; TurboMind computes on GPUs

# Needing no key in LMDeploy:
# - device: auto: TurboMind runs on NVIDIA GPUs
# - gpu_memory_utilization: 0.9: has no effect on the CPU, where this was measured
# - cuda_graphs: true: has no effect on the CPU, where this was measured
# - enable_prefix_caching: false: LMDeploy shares no prefixes unless it is told to (tuned:
#     default true; measured in trials 31, 33, 35)
# - enable_chunked_prefill: true: it decides which keys max_num_batched_tokens has here
# - batching_mode: continuous: LMDeploy always batches continuously
# - max_queue_delay: 0.05: belongs to dynamic batching, which LMDeploy has not
# - watermark: 0.0: LMDeploy too holds no blocks back
