#!/usr/bin/env bash
# Starts SGLang 0.5.23 with sglang.yaml, where all else is told.
# HOST and PORT may be set; further options go to the engine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python3 -m sglang.launch_server --config "$here/sglang.yaml" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
