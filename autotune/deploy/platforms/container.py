"""What every container of a serving engine needs, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.deploy.platforms.carried import PORT, Carried
from autotune.deploy.target import BUNDLED

MODELS = "/models"
CONFIG = "/etc/autotune"
HUB_CACHE = "/root/.cache/huggingface"
# A process of one engine shares memory with its workers there; Docker's own 64 MiB are too few.
SHARED_MEMORY = "8g"


def health_check() -> list[str]:
    """A command that succeeds once the engine answers, with Python, which every image has."""
    url = f"http://127.0.0.1:{PORT}/health"
    return ["python3", "-c", f"import urllib.request as r; r.urlopen('{url}', timeout=5)"]


def dockerfile(carried: Carried, run: Mapping[str, Any]) -> dict[str, str]:
    """The Dockerfile of the bundled engine, by file name; nothing for engines with an image.

    Arguments:
        carried: the engine.
        run: the content of `run.json`, with the version of PyTorch that it was measured with.
    """
    if carried.engine != BUNDLED:
        return {}
    torch = (run.get("versions") or {}).get("torch") or ""
    release, _, build = torch.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    wanted = f"torch=={release}" if release else "torch"
    lines = [
        f"# Image of {carried.title}. In a checkout of that release:",
        f"#   docker build -f Dockerfile -t {carried.image} CHECKOUT",
        "FROM python:3.11-slim-bookworm",
        "# A compiler: PyTorch and Triton build kernels when the engine starts.",
        "RUN apt-get update && apt-get install -y --no-install-recommends g++ \\",
        "    && rm -rf /var/lib/apt/lists/*",
        "COPY . /opt/autotune",
        "# PyTorch as it was measured, which the constraints of that release may not replace.",
        f"RUN pip install --no-cache-dir {wanted}{index} \\",
        "    && sed -i -E '/^(torch|triton)==/d' /opt/autotune/constraints.txt \\",
        "    && pip install --no-cache-dir /opt/autotune -c /opt/autotune/constraints.txt",
        "RUN useradd --create-home serving",
        "USER serving",
        f"EXPOSE {PORT}",
        'ENTRYPOINT ["autotune"]',
    ]
    return {"Dockerfile": "\n".join(lines) + "\n"}
