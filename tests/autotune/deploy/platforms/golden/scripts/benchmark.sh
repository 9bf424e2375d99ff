#!/bin/sh
# The load that the configuration was tuned under, offered to the server. Run it where the run
# was started: a trace is named as it was there.
# Measured before: one replica bore 4 requests/s and met the SLO; it may bear more (97.5% of the
# requests within every limit); 6 requests were in flight on average, 184.8 tokens/s came out;
# trials 31, 33, 35
# URL, MODEL and AUTOTUNE (the program) may be set; API_KEY too, if the server wants one.
# Without autotune, with random prompts of the same mean lengths:
#   vllm bench serve --base-url "$URL" --model "$MODEL" --dataset-name random --random-input-len 388 --random-output-len 46 --num-prompts 240 --request-rate 4
set -eu
URL=${URL:-http://127.0.0.1:8000}
MODEL=${MODEL:-'Example 1B'}
if [ -n "${API_KEY:-}" ]; then set -- --api-key-env API_KEY "$@"; fi
exec "${AUTOTUNE:-autotune}" bench --url "$URL" --served-model "$MODEL" \
  --workload chat --rate 4 --scale-lengths 0.5 --duration 60s --slo 'ttft<200ms,tpot<100ms' "$@"
