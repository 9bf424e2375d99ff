#!/usr/bin/env bash
# Starts TensorRT-LLM 1.2.1 with trtllm.yaml, where all else is told.
# HOST, PORT and MODEL may be set; further options go to the engine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
model=${MODEL:-models/example}
exec trtllm-serve "$model" --backend pytorch --extra_llm_api_options "$here/trtllm.yaml" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
