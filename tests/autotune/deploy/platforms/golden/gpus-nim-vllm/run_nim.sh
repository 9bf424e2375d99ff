#!/bin/sh
# Runs the container. NGC_API_KEY and HF_TOKEN are taken from the environment, where they are
# set; the address is this machine's alone unless BIND says otherwise.
set -eu
cd "$(dirname "$0")"
exec docker run --rm --gpus "${GPUS:-all}" --shm-size 8g \
  --publish "${BIND:-127.0.0.1}:${HTTP_PORT:-8000}:8000" \
  --env-file nim.env --env NGC_API_KEY --env HF_TOKEN \
  --volume nim-cache:/opt/nim/.cache \
  nvcr.io/nim/nvidia/vllm-model-free-nim:2.1.1
