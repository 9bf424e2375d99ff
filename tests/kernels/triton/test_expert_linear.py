"""A mixture of experts on the device: pairs sorted, formats multiplied, choices summed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.experts import Experts, run_experts
from engine.models.spec import DecoderSpec, ExpertsSpec, RopeSpec
from engine.quantize import forms
from engine.quantize.methods import quantize_weight
from kernels import ops, plain_linear, reference
from kernels.experts import pack_experts, run_stacked
from kernels.triton import expert_linear, expert_order, fp8_linear, runtime
from kernels.triton.expert_order import order_by_expert
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Problem
from kernels.weights import Fp8Weight, LinearWeight
from tests.engine.tiny_models import make_tiny

Make = Callable[[int, int], LinearWeight]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block_m"),
    [(1, 2, 3, 16), (37, 2, 5, 16), (90, 8, 130, 16), (300, 1, 2, 32)],
)
def test_pairs_are_sorted_into_tiles(device, tokens, top_k, experts, block_m) -> None:
    chosen = torch.rand(tokens, experts, device=device).topk(top_k, -1).indices
    chosen[:, 0] = experts - 1
    order = order_by_expert(chosen, experts, block_m)
    flat = chosen.flatten().tolist()
    expected: list[tuple[int, list[int]]] = []
    for expert in range(experts):
        own = [pair for pair, taken in enumerate(flat) if taken == expert]
        expected += [(expert, own[i : i + block_m]) for i in range(0, len(own), block_m)]
    rows = order.rows.tolist()
    held = [
        (expert, order.pairs[t * block_m : t * block_m + rows[t]].tolist())
        for t, expert in enumerate(order.experts.tolist())
        if rows[t]
    ]
    assert held == expected
    assert not any(rows[len(expected) :])


def test_there_are_tiles_enough_for_any_choice() -> None:
    for pairs, experts, block_m in [(1, 8, 16), (16, 8, 16), (40, 3, 16), (129, 128, 128)]:
        lonely = min(pairs, experts) - 1
        needed = lonely + -(-(pairs - lonely) // block_m)
        assert expert_order.most_tiles(pairs, experts, block_m) >= needed


def dense(n: int, k: int) -> LinearWeight:
    return ops.pack_dense(torch.randn(n, k) / k**0.5)


def int8(n: int, k: int) -> LinearWeight:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return ops.pack_int8(q, torch.rand(n) / k)


def int4(n: int, k: int) -> LinearWeight:
    q, groups = torch.randint(0, 16, (n, k), dtype=torch.uint8), (n, k // 32)
    return ops.pack_int4(q, torch.rand(groups) / k, torch.rand(groups) * 15, 32)


def symmetric(n: int, k: int) -> LinearWeight:
    q, groups = torch.randint(0, 16, (n, k), dtype=torch.uint8), (n, k // 32)
    return ops.pack_int4(q, torch.rand(groups) / k, torch.full(groups, 8.0), 32)


def nf4(n: int, k: int) -> LinearWeight:
    q, groups = torch.randint(0, 16, (n, k), dtype=torch.uint8), (n, k // 32)
    return ops.pack_table4(q, torch.rand(groups) / k**0.5, torch.randn(16).bfloat16().float(), 32)


def int8_groups(n: int, k: int) -> LinearWeight:
    q, groups = torch.randint(-128, 128, (n, k), dtype=torch.int8), (n, k // 32)
    return ops.pack_int8_groups(q, torch.rand(groups) / k, torch.rand(groups) * 40 - 20, 32)


def fp8(activations: str, block: tuple[int, int] | None = None) -> Make:
    def make(n: int, k: int) -> LinearWeight:
        data = (torch.randn(n, k) / k**0.5).to(torch.float8_e4m3fn)
        blocks = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
        static = torch.rand(1) / 50 + 0.01 if activations == "static" else None
        scales = torch.rand(blocks) + 0.5
        return ops.pack_fp8(data, scales, None, block, activations, static)  # type: ignore[arg-type]

    return make


FORMATS = {
    "dense": dense,
    "int8": int8,
    "int4": int4,
    "int4_symmetric": symmetric,
    "int8_groups": int8_groups,
    "nf4": nf4,
    "fp8": fp8("dynamic"),
    "fp8_static": fp8("static"),
    "fp8_blocks": fp8("dynamic", (32, 64)),
    "fp8_one_block": fp8("dynamic", (128, 32)),
    "fp8_weights": fp8("none"),
    "fp8_weights_blocks": fp8("none", (32, 64)),
}
OLD = DeviceFacts("old", (8, 0), 8, 166_912)
HALVES = ("int4", "int4_symmetric", "int8_groups", "nf4", "fp8_weights", "fp8_weights_blocks")


def of_experts(make: Make, shapes: list[tuple[int, int]], count: int, device: torch.device):
    """For each shape the weights of all experts."""
    with device:
        return [[make(n, k) for _ in range(count)] for n, k in shapes]


@pytest.mark.parametrize(
    ("kind", "tokens", "dtype", "facts"),
    [
        *((kind, 4, torch.float32, None) for kind in FORMATS if kind not in HALVES),
        *((kind, 3, torch.bfloat16, None) for kind in HALVES),
        ("dense", 110, torch.float16, None),
        ("int8", 40, torch.bfloat16, None),
        ("int4", 70, torch.float16, None),
        ("fp8", 110, torch.bfloat16, None),
        ("fp8", 5, torch.bfloat16, OLD),
        ("fp8_blocks", 40, torch.float16, OLD),
    ],
)
def test_formats(device, monkeypatch, kind, tokens, dtype, facts) -> None:
    """Against each expert's layer by itself; on devices without e4m3 too."""
    if facts is not None:
        if device.type == "cuda":
            pytest.skip("the GPU is what it is")
        for module in (expert_linear, fp8_linear):
            monkeypatch.setattr(module, "facts_of", lambda _: facts)
    count, top_k, hidden, inner = 3, 2, 96, 32
    parts = of_experts(FORMATS[kind], [(2 * inner, hidden), (hidden, inner)], count, device)
    if kind == "dense":
        parts = [[moved_to(weight, dtype) for weight in part] for part in parts]
    stacked = [pack_experts(part) for part in parts]
    assert stacked[0] is not None
    assert stacked[1] is not None
    for part, packed in zip(parts, stacked, strict=True):
        for i, weight in enumerate(part):
            assert torch.equal(ops.dequantize(packed.expert(i)), ops.dequantize(weight))
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    chosen = torch.rand(tokens, count, device=device).topk(top_k, -1).indices
    weights = torch.rand(tokens, top_k, device=device)
    out = run_stacked(x, stacked[0], stacked[1], weights, chosen, gated)
    assert out is not None
    assert out.dtype == dtype
    wide = [[ops.dequantize(weight).double() for weight in part] for part in parts]
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token, taken in enumerate(chosen.tolist()):
        for choice, expert in enumerate(taken):
            inner_rows = gated(one(x[token : token + 1], parts[0][expert], wide[0][expert]))
            row = one(inner_rows, parts[1][expert], wide[1][expert])[0].cpu().double()
            expected[token] += float(weights[token, choice]) * row
    # Zeros between integers are rounded with the code to bfloat16.
    assert error(out, expected) < {2: 1e-2 if kind in HALVES else 6e-3, 4: 2e-6}[dtype.itemsize]
    assert run_stacked(x[:0], stacked[0], stacked[1], weights[:0], chosen[:0], gated).shape[0] == 0


def moved_to(weight: LinearWeight, dtype: torch.dtype) -> LinearWeight:
    assert isinstance(weight, ops.DenseWeight)
    return ops.DenseWeight(weight.data.to(dtype), None, weight.shape)


def one(x: Tensor, weight: LinearWeight, wide: Tensor) -> Tensor:
    """A layer in plain PyTorch, its result in x's dtype; `wide` is the weight in float64."""
    rounded = x
    if isinstance(weight, Fp8Weight):
        rounded = plain_linear.round_fp8(x, weight)
    elif isinstance(weight, ops.Int8Weight):
        q, scales = plain_linear.quantize_rows(x)
        rounded = q.float() * scales
    return reference.linear(rounded.double(), wide).to(x.dtype)


@pytest.mark.parametrize("method", ["none", "int4", "fp8"])
def test_a_layer_is_what_it_is_expert_by_expert(device, method: str, spec: DecoderSpec) -> None:
    assert spec.experts is not None
    inner, hidden, count = 32, spec.hidden_size, spec.experts.num_experts
    dtype = torch.bfloat16 if method == "int4" else torch.float32

    def layer(n: int, k: int) -> LinearWeight:
        weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
        form = forms.DenseForm(weight) if method == "none" else quantize_weight(weight, method)
        return forms.pack([form], None, dtype)

    router = ops.pack_dense(torch.randn(count, hidden, device=device).to(dtype))
    pairs = [(layer(2 * inner, hidden), layer(hidden, inner)) for _ in range(count)]
    experts = Experts.of(router, pairs)
    assert experts.stacked is not None
    alone = Experts(router, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))
    assert experts.nbytes == alone.nbytes
    x = torch.randn(9, hidden, device=device).to(dtype)
    together = run_experts(spec, experts, x)
    expected = run_experts(spec, alone, x)
    assert error(together, expected.cpu().double()) < {4: 1e-3, 2: 8e-3}[dtype.itemsize]
    seen: list[str] = []
    viewed = run_experts(spec, experts, x, lambda name, _: seen.append(name))
    assert torch.equal(viewed, expected)
    assert len(seen) > 2


def test_a_checkpoints_experts_lie_side_by_side(device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("the tiny decoder is a CPU's")
    tiny = make_tiny("mixtral", tmp_path, num_hidden_layers=1)
    stacked = tiny.decoder(quantization="int8")
    with runtime.without_triton():
        alone = tiny.decoder(quantization="int8")
        x = torch.randn(7, alone.spec.hidden_size)
        layers = [layer.mlp for layer in alone.layers]
        assert isinstance(layers[0], Experts)
        assert layers[0].stacked is None
        expected = run_experts(alone.spec, layers[0], x)
    experts = stacked.layers[0].mlp
    assert isinstance(experts, Experts)
    assert experts.stacked is not None
    assert error(run_experts(stacked.spec, experts, x), expected.double()) < 1e-3


def test_candidates_fit_every_device() -> None:
    for capability, memory in (((8, 9), 101_376), ((8, 0), 166_912), ((10, 0), 232_448)):
        facts = DeviceFacts("some", capability, 100, memory)
        for block_m in (16, 32, 64, 128):
            sizes = (block_m, 4096, 4096, 8)
            problems = [
                Problem("expert_linear", (*sizes, columns, 128), ("torch.bfloat16", kind))
                for kind in ("torch.bfloat16", "torch.float32", "int8", "e4m3", "codes")
                for columns in (0, 32, 128)
            ]
            problems += [
                Problem("expert_weight_only", (*sizes, 16 * lanes * size, 128, lanes), ("x",))
                for lanes in (2, 4)
                for size in (1, 4)
            ]
            for problem in problems:
                found = expert_linear.choices(problem, facts)
                assert 0 < len(found) <= 12
                assert expert_linear.default_choice(problem, facts) == found[0]


def test_what_no_kernel_takes_goes_expert_by_expert(device, spec: DecoderSpec) -> None:
    parts = of_experts(int8, [(64, 40), (40, 64)], 3, device)
    assert pack_experts(parts[0]) is None  # 40 columns
    assert pack_experts([parts[1][0], ops.pack_dense(torch.randn(40, 64, device=device))]) is None
    router = ops.DenseWeight(torch.randn(3, 40, device=device), None, (3, 40))
    experts = Experts.of(router, list(zip(*parts, strict=True)))
    assert experts.stacked is None
    stacked = [pack_experts(part) for part in of_experts(int4, [(64, 32), (32, 32)], 2, device)]
    assert stacked[0] is not None
    assert stacked[1] is not None
    x, chosen = torch.randn(1, 32, device=device), torch.zeros(1, 1, dtype=torch.int64)
    # Weights that are only stored small are not for activations of 32 bits.
    assert run_stacked(x, stacked[0], stacked[1], torch.ones(1, 1), chosen, gated) is None


@pytest.fixture
def spec() -> DecoderSpec:
    return DecoderSpec(
        architecture="Qwen3MoeForCausalLM",
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=32,
        max_position=32,
        rms_norm_eps=1e-6,
        rope=RopeSpec(10_000.0),
        tie_word_embeddings=False,
        checkpoint_dtype="float32",
        layer_windows=(0,),
        experts=ExpertsSpec(5, 2, 32, normalize=True, layers=(True,)),
    )
