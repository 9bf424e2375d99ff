"""What the replicas tell of themselves, as one page for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from engine.server.replica import Replica

_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def merge_pages(pages: Mapping[int, str]) -> str:
    """The pages of several replicas as one: every sample gets a label `replica`.

    Samples of one family stand together under one HELP and TYPE, as the text format wants it.
    """
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for number, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, family, *_ = [*line.split(" ", 3), ""]
                heads.setdefault(family, {}).setdefault(kind, line)
            elif line and not line.startswith("#"):
                name = _NAME.match(line)
                if name is None:
                    continue
                # A histogram's samples have longer names than their family.
                if not family or not name.group().startswith(family):
                    family = name.group()
                rest = line[name.end() :]
                inner = f",{rest[1:]}" if rest.startswith("{") and rest[1:2] != "}" else None
                tail = inner if inner is not None else "}" + rest.removeprefix("{}")
                labelled = f'{name.group()}{{replica="{number}"{tail}'
                samples.setdefault(family, []).append(labelled)
    lines: list[str] = []
    for family, found in samples.items():
        lines += [*heads.get(family, {}).values(), *found]
    return "\n".join(lines) + "\n" if lines else ""


def cache_tokens(page: str) -> int | None:
    """How many tokens the KV cache of a server holds, if its metrics tell."""
    found = _CACHE.search(page)
    labels = dict(_LABEL.findall(found.group(1))) if found else {}
    try:
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"]) or None
    except (KeyError, ValueError):
        return None


def router_page(replicas: Sequence[Replica]) -> str:
    """What the router itself tells of its replicas."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, values: Iterable[int]) -> None:
        lines.append(f"# HELP {name} {text}")
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(
            f'{name}{{replica="{r.number}"}} {value}'
            for r, value in zip(replicas, values, strict=True)
        )

    family(
        "autotune:router_replica_up",
        "gauge",
        "Whether the replica is sent requests.",
        [int(r.ready) for r in replicas],
    )
    family(
        "autotune:router_outstanding_sequences",
        "gauge",
        "Sequences that the replica has unfinished.",
        [r.outstanding for r in replicas],
    )
    family(
        "autotune:router_requests_total",
        "counter",
        "Requests that the replica was sent.",
        [r.requests for r in replicas],
    )
    family(
        "autotune:router_failures_total",
        "counter",
        "Requests that the replica did not take up or broke off.",
        [r.failures for r in replicas],
    )
    family(
        "autotune:router_restarts_total",
        "counter",
        "How often the replica's process was started again.",
        [r.restarts for r in replicas],
    )
    family(
        "autotune:router_prompt_blocks_total",
        "counter",
        "Blocks of prompts that the replica was sent.",
        [r.asked_blocks for r in replicas],
    )
    family(
        "autotune:router_known_prompt_blocks_total",
        "counter",
        "Blocks of prompts that the replica had been sent before.",
        [r.known_blocks for r in replicas],
    )
    return "\n".join(lines) + "\n"
