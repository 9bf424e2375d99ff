#!/usr/bin/env bash
# Checks and times everything on the GPU of this machine, in at most 8 minutes and without a network:
# kernel tests compiled for it, errors against float64, times against floors and PyTorch's own
# kernels, the engine, and a profile of it with what the driver tells. Writes JSON to benchmarks/results/<device>/ (or the folder given).
#
#   scripts/gpu_check.sh [folder for results]
#
# Needs Python with torch, triton, transformers and pytest; PYTHON=... chooses another than python3.
# Exit codes: 0 all right, 1 a kernel is wrong or failed, 3 no usable GPU or a package is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=${1:-benchmarks/results}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

missing=$("$PYTHON" - <<'CODE'
import importlib.util as util
needed = ("torch", "triton", "transformers", "pytest", "hypothesis", "numpy", "psutil",
          "safetensors", "tokenizers", "scipy", "optuna", "pandas", "prometheus_client", "pyarrow",
          "pydantic", "pynvml", "rich", "typer", "yaml", "jinja2")
print(" ".join(name for name in needed if util.find_spec(name) is None))
CODE
) || { echo "$PYTHON does not run; set PYTHON=..." >&2; exit 3; }
if [ -n "$missing" ]; then
    echo "Missing Python packages: $missing. Install them for $PYTHON, or set PYTHON=..." >&2
    exit 3
fi
"$PYTHON" - <<'CODE' || exit 3
import sys, torch
from kernels.triton.runtime import status
found = status(torch.device("cuda", 0))
if not found.available:
    sys.exit(f"No check: {found.reason}. A GPU of compute capability 8.0 or newer is needed, with "
             "Triton beside a CUDA build of PyTorch.")
CODE

# Only the plugins that are needed: others that happen to be installed may warn, which fails a test.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -W ignore::pytest.PytestConfigWarning)
has() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }
if has pytest_timeout; then pytest+=(-p pytest_timeout); fi
# Tests spend their time compiling, each kernel on one core.
if has xdist; then pytest+=(-p xdist.plugin -n "$(( ($(nproc) * 3 + 3) / 4 ))" --dist worksteal); fi

failed=0
echo "== Kernel tests, compiled"
timeout 130 "${pytest[@]}" tests/kernels/triton tests/engine/test_sampler_launch.py \
    tests/engine/test_engine_gpu.py tests/engine/test_parallel_gpu.py || failed=1
echo "== Errors and times"
timeout 260 "$PYTHON" -m benchmarks.gpu.check --out "$out" --seconds 240 || failed=1
echo "== A profile"
device=$("$PYTHON" -c 'import torch; from benchmarks.gpu.check import machine; print(machine(torch.device("cuda", 0)))')
profile=$(mktemp -d)/profile
timeout 75 "$PYTHON" -m autotune.cli.main profile --load 0.7 --duration 10s -o "$profile" \
    && cp "$profile/profile.json" "$out/$device/" || failed=1
exit $failed
