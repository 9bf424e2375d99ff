"""Launchers run with Triton's own specialisation of arguments, for a GPU that is not here.

Tensors are on the CPU and nothing is launched: kernels are taken as far as Triton's IR, or as far
as the use of shared memory. So an argument that Triton makes a constant, a tile that no matrix
instruction takes or that does not fit, and a kernel that is compiled once more for another number
of rows are found without a GPU. `python -m tests.kernels.triton.launches` prints what it found, one
line each, and exits with 1 if that is anything. Not in a process with TRITON_INTERPRET=1.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir, make_backend
from triton.runtime import driver, jit

from kernels import ops, sampling
from kernels.experts import pack_experts, run_stacked
from kernels.layer_cache import LayerCache
from kernels.triton import (
    activation,
    attention,
    cache_write,
    cached_values,
    decode_attention,
    expert_linear,
    fp8_linear,
    int8_linear,
    norm,
    prefill_attention,
    quantize_rows,
    runtime,
    scaled_matmul,
    tuning,
    weight_only,
)
from kernels.triton.runtime import DeviceFacts

H200 = DeviceFacts("H200", (9, 0), 132, 232_448)
L40S = DeviceFacts("L40S", (8, 9), 142, 101_376)
LAUNCHERS = (activation, cache_write, decode_attention, expert_linear, fp8_linear, int8_linear)
LAUNCHERS += (norm, prefill_attention, quantize_rows, scaled_matmul, weight_only)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
run_compiled = jit.JITFunction.run
assembly_for = cached_values.assembly_for


class Pretended:
    """A device's part of Triton, and what was compiled for it: `kernels` by name, `errors`.

    `stage` is how far: "" not at all, "ttir", or "llir", which is when shared memory is known.
    """

    def __init__(self, facts: DeviceFacts) -> None:
        self.facts = facts
        self.kernels: Counter[str] = Counter()
        self.errors: list[str] = []
        self.stage = ""

    def get_current_target(self) -> GPUTarget:
        major, minor = self.facts.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> DeviceFacts:
        return self.facts

    def get_current_stream(self, device: object) -> int:
        return 0

    def compile(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> object:
        name = source.fn.__name__
        self.kernels[name] += 1
        if self.stage:
            try:
                self._lower(name, source, target, options)
            except Exception as error:
                told = " ".join(str(error).split())
                self.errors.append(f"{name}: {type(error).__name__}: {told}")
        return self

    def _lower(self, name: str, source: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        backend = make_backend(target)
        parsed = backend.parse_options({**options, **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        generated = backend.get_codegen_implementation(parsed)
        module = source.make_ir(target, parsed, generated, backend.get_module_map(), context)
        metadata: dict[str, Any] = {"hash": "", "target": target, **parsed.__dict__}
        stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
        backend.add_stages(stages, parsed, source.language)
        for stage, lower in stages.items():
            module = lower(module, metadata)
            if stage == self.stage:
                break
        shared = metadata.get("shared", 0)
        if shared > self.facts.shared_memory:
            self.errors.append(f"{name}: {shared} bytes of shared memory do not fit")


@contextmanager
def pretending(facts: DeviceFacts) -> Iterator[Pretended]:
    """Launches inside the block are for such a device."""
    device = Pretended(facts)

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        if "INTERPRETED" in named:
            named["INTERPRETED"] = False
        if max(grid[1:], default=0) > 65_535:
            device.errors.append(f"{kernel.__name__}: a grid of {grid}")
        run_compiled(kernel, *args, grid=grid, warmup=True, **named)

    driver.set_active(device)
    triton.compiler.compile = device.compile
    jit.JITFunction.run = run
    for module in LAUNCHERS:
        module.facts_of = lambda _: facts
    for module in (decode_attention, prefill_attention):
        module.assembly_for = lambda kind, found, _: assembly_for(kind, found, torch.device("cuda"))
    tuning.use(tuning.TuningTable(), facts)
    yield device


def int4(n: int, k: int) -> ops.LinearWeight:
    groups = (n, k // 32)
    q = torch.zeros(n, k, dtype=torch.uint8)
    return ops.pack_int4(q, torch.ones(groups), torch.full(groups, 8.0), 32)


def int8(n: int, k: int, threshold: float = 0.0) -> ops.LinearWeight:
    q = torch.zeros(n, k, dtype=torch.int8)
    return ops.pack_int8(q, torch.ones(n), None, threshold)


def fp8(n: int, k: int, block: tuple[int, int] | None = None) -> ops.LinearWeight:
    shape = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
    return ops.pack_fp8(torch.zeros(n, k).to(torch.float8_e4m3fn), torch.ones(shape), None, block)


def attend(dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int, new: int) -> None:
    """A decode beside a chunk, and by windows and caps, of one key/value head."""
    for prefix, window, cap in ((9, 0, 0.0), (9, 64, 20.0), (1500, 0, 0.0)):
        attend_with(dtype, cache_dtype, head_dim, [(1, 700), (new, new + prefix)], window, cap)
    attend_with(dtype, cache_dtype, head_dim, [(5, 700), (new, new + 1500)], 0, 0.0, True)


def attend_with(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    sequences: list[tuple[int, int]],
    window: int,
    cap: float,
    trees: bool = False,
) -> None:
    """Attention of sequences of (new tokens, context), of which the first may be a tree."""
    tables = [[0] * -(-context // 16) for _, context in sequences]
    lengths = [[sequence[i] for sequence in sequences] for i in (0, 1)]
    masks = [-1] * sum(lengths[0]) if trees else None
    new = sequences[0][0]
    metadata = ops.build_attention_metadata(tables, *lengths, 16, "cpu", new, masks)
    q = torch.zeros(metadata.num_tokens, 2, head_dim, dtype=dtype)
    cache = LayerCache.allocate((1, 1, 16, head_dim), cache_dtype)
    assert attention.paged_attention(q, cache, metadata, 0.1, window, cap) is not None


def gated(x: Tensor) -> Tensor:
    return ops.silu_and_mul(x)


def step(tokens: int, dtype: torch.dtype = BF16) -> None:
    """Operations of a step whose kernels know of the number of tokens."""
    x = torch.zeros(tokens, 512, dtype=dtype)
    for weight in WEIGHTS:
        ops.linear(x, weight)
    ops.head_rms_norm(x.view(tokens, 4, 128), torch.ones(128), 1e-6)
    shares, chosen = ops.route(torch.zeros(tokens, 8, dtype=dtype), 2, True)
    for gate_up, down in EXPERTS:
        out = run_stacked(x[:, :128].contiguous(), gate_up, down, shares, chosen, gated)
        assert out is not None


def check_odd_shapes() -> list[str]:
    """One row, one column, one head, the smallest heads: Triton makes constants of ones."""
    with pretending(H200) as device:
        device.stage = "ttir"
        for dtype, cache_dtype in ((BF16, BF16), (FP16, torch.int8), (FP32, torch.float8_e4m3fn)):
            attend(dtype, cache_dtype, 16, 20)
        for weight in (int4(1, 512), int8(1, 512, 6.0), fp8(1, 512), fp8(1, 512, (128, 128))):
            ops.linear(torch.zeros(1, 512, dtype=BF16), weight)
        ops.add_rms_norm(*(torch.zeros(1, 1) for _ in range(2)), torch.ones(1), 1e-6)
        ops.silu_and_mul(torch.zeros(1, 2))
        ops.route(torch.zeros(1, 1), 1, True)
        sampling.draw_packed(torch.zeros(1, 1), torch.zeros(5, 1, dtype=torch.float64))
        step(1)
    return device.errors


def check_numbers_of_rows() -> list[str]:
    """What was compiled for a power of two and the number below serves those between."""
    # A device of its own, or Triton would count what it compiles for the one before.
    with pretending(H200._replace(name="another H200")) as device:
        for tokens in (31, 32, 63, 64, 255, 256, 511, 512):
            step(tokens)
        before = device.kernels.copy()
        for tokens in (17, 24, 33, 40, 48, 129, 160, 257, 300, 400):
            step(tokens)
    if not before:
        return ["no kernel was compiled"]
    return [f"{name}: compiled again" for name in device.kernels - before]


def check_shared_memory() -> list[str]:
    """Tiles that are the largest of their kernels fit a device with 99 KiB."""
    with pretending(L40S) as device:
        device.stage = "llir"
        ops.linear(torch.zeros(200, 512), int8(256, 512, 6.0))
    return device.errors


if __name__ == "__main__":
    runtime.runs_on = lambda _: True
    WEIGHTS = (int4(256, 512), int8(256, 512), int8(256, 512, 6.0), fp8(256, 512))
    WEIGHTS += (fp8(256, 512, (128, 128)),)
    EXPERTS = [
        [pack_experts([make(n, k) for _ in range(8)]) for n, k in ((128, 128), (128, 64))]
        for make in (int4, int8)
    ]
    found = check_odd_shapes() + check_numbers_of_rows() + check_shared_memory()
    print("\n".join(found))
    sys.exit(1 if found else 0)
