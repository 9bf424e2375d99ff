"""The memory of one GPU as a sum: a bar an option, divided by what lies in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.formatting import mapping, number, significant, size
from reports.plan.evidence import Option, Plan

_GIB = 2.0**30
# In the order in which they are laid into the bar; by name in the plan, with title and colour.
_PARTS: Mapping[str, tuple[str, str]] = {
    "weights": ("weights", "c-weights"),
    "framework": ("framework and context", "c-other"),
    "libraries": ("libraries and context", "c-other"),
    "communication": ("communication buffers", "c-communication"),
    "nccl": ("communication buffers", "c-communication"),
    "graphs": ("graphs", "c-host"),
    "workspace": ("workspace", "c-host"),
    "activations": ("activations, at their peak", "c-prefill"),
    "kv_cache": ("KV cache", "c-kv"),
    "unused": ("left over", "c-unused"),
    "reserved": ("left alone by gpu_memory_utilization", "c-idle"),
}
_OTHERS = ("c-queue", "c-attention", "c-interference", "c-preempted", "c-compute")
# Sums and counts that may stand beside the parts.
_NO_PART = (
    "total_bytes",
    "kv_tokens",
    "kv_bytes_per_token",
    "kv_tokens_needed",
    "shortfall_bytes",
    "fits",
)
_LEAST_LABELLED = 0.08
_MOST_BARS = 10


@dataclass(frozen=True, slots=True)
class MemorySum:
    """The parts of one GPU's memory in bytes, in the order of the bar."""

    option: Option
    parts: Sequence[tuple[str, str, float]]
    capacity: float | None
    needed: float | None
    shortfall: float
    tokens: float | None

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(count for _, _, count in self.parts)

    @property
    def reach(self) -> float:
        """How far the bar goes, with what is missing."""
        return max(self.total, (self.capacity or self.total) + self.shortfall)


def memory_sums(plan: Plan) -> list[MemorySum]:
    """The sums of the best option of each GPU, and of the best that does not fit."""
    shown = list(plan.best_of_each)
    for option in plan.options:
        if not option.fits and all(s.gpu != option.gpu or s.fits for s in shown):
            shown.append(option)
    sums = [s for s in map(read_memory, shown) if s.parts]
    return sums[:_MOST_BARS]


def read_memory(option: Option) -> MemorySum:
    """One option's memory; parts that are no number above 0 are left out."""
    memory = option.memory
    raw = mapping(memory.get("parts")) or {k: v for k, v in memory.items() if k not in _NO_PART}
    order = [*(k for k in _PARTS if k in raw), *(k for k in raw if k not in _PARTS)]
    spare = iter(_OTHERS * 4)
    parts = []
    for name in order:
        count = number(raw.get(name))
        if count is None or count <= 0:
            continue
        title, colour = _PARTS.get(name, (name.replace("_", " "), ""))
        parts.append((title, colour or next(spare, "c-other"), count))
    tokens, each = (number(memory.get(k)) for k in ("kv_tokens_needed", "kv_bytes_per_token"))
    return MemorySum(
        option,
        parts,
        number(memory.get("total_bytes")),
        None if tokens is None or each is None else tokens * each,
        max(number(memory.get("shortfall_bytes")) or 0.0, 0.0),
        number(memory.get("kv_tokens")),
    )


def memory_bars(plan: Plan) -> Figure | None:
    """A bar an option; None where no memory was counted."""
    sums = memory_sums(plan)
    if not sums:
        return None
    count = len(sums)
    far = max(s.reach for s in sums) / _GIB * 1.13  # room for the text behind the longest
    labels = [(count - 1 - i, s.option.one[:28]) for i, s in enumerate(sums)]
    plot = Plot(
        Axis("GiB of one GPU", 0.0, far),
        Axis("", -0.6, count - 0.4, ticks=labels, grid=False),
        width=960,
        height=64 + 58 * count,
        left=190,
        top=10,
        right=20,
    )
    seen: dict[str, str] = {}
    rows = []
    for index, entry in enumerate(sums):
        row = count - 1 - index
        _draw_bar(plot, entry, row, far)
        for title, colour, amount in entry.parts:
            seen.setdefault(title, colour)
            rows.append([entry.option.short, title, size(amount)])
        rows.append([entry.option.short, "sum", size(entry.total)])
        rows.append([entry.option.short, "memory of the GPU", size(entry.capacity)])
        if entry.shortfall > 0:
            rows.append([entry.option.short, "missing", size(entry.shortfall)])
    legend = [mark_key("square", f"part {colour}", title) for title, colour in seen.items()]
    if any(s.shortfall > 0 for s in sums):
        legend.append(mark_key("square", "s-missing-key", "missing"))
    return Figure(
        id="memory",
        title="Where the memory goes",
        caption=(
            "One GPU of the best option of each kind, and of what does not fit. The dark upright "
            "line is the memory that the GPU has; a bar that passes it does not fit. What is left "
            "beside weights and overheads is the KV cache, which bounds how many requests run at "
            "once."
        ),
        drawings=[plot.render()],
        columns=["Option", "Part", "Size"],
        rows=rows,
        legend=legend,
    )


def _draw_bar(plot: Plot, entry: MemorySum, row: int, far: float) -> None:
    at = 0.0
    for title, colour, amount in entry.parts:
        width = amount / _GIB
        tip = f"{entry.option.short}: {title} {size(amount)}"
        plot.bar((at, row - 0.26), (at + width, row + 0.26), f"part {colour}", tip)
        if width >= _LEAST_LABELLED * far:
            middle = plot.x(at + width / 2)
            text = significant(width)
            plot.text(middle, plot.y(row) + 4, text, "on-part", anchor="middle")
        at += width
    missing = entry.reach / _GIB
    if entry.shortfall > 0 and missing > at:
        tip = f"{entry.option.short}: {size(entry.shortfall)} missing"
        plot.bar((at, row - 0.26), (missing, row + 0.26), "s-missing", tip)
    if entry.capacity is not None:
        edge = entry.capacity / _GIB
        plot.line([(edge, row - 0.26), (edge, row + 0.4)], "s-capacity")
        text = f"{size(entry.capacity)} in all"
        plot.text(plot.x(max(at, missing, edge)) + 7, plot.y(row) + 4, text, "value")
    told = _told(entry)
    if told:
        class_ = "value s-missed" if entry.shortfall > 0 or not entry.option.fits else "value"
        plot.text(plot.left, plot.y(row - 0.26) + 13, told, class_)


def _told(entry: MemorySum) -> str:
    """What the sum means, below the bar."""
    if entry.shortfall > 0:
        return f"does not fit: {size(entry.shortfall)} short on each GPU"
    if not entry.option.fits:
        return str(entry.option.raw.get("reason") or "does not fit")[:120]
    parts = []
    if entry.tokens is not None:
        parts.append(f"KV cache for {significant(entry.tokens)} tokens a replica")
    if entry.needed is not None:
        parts.append(f"{size(entry.needed)} of it in use during a burst")
    return ", ".join(parts)
