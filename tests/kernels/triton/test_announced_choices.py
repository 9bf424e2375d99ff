"""What every kernel announces: few choices, the default among them, all with the same result."""

import importlib
from functools import cache
from itertools import product

import pytest
import torch

from kernels import ops
from kernels.layer_cache import LayerCache
from kernels.metadata import build_attention_metadata
from kernels.triton import measure, runtime, tuning
from kernels.triton.runtime import DeviceFacts

MOST = 12
FACTS = [
    runtime.INTERPRETED,
    DeviceFacts("A100", (8, 0), 108, 166_912),
    DeviceFacts("L40S", (8, 9), 142, 101_376),
    DeviceFacts("H200", (9, 0), 132, 232_448),
]
ROWS, N, K = 5, 64, 128


def int8_linear(device, threshold=0.0):
    q = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
    weight = ops.pack_int8(q, torch.rand(N, device=device) / 99, outlier_threshold=threshold)
    x = torch.randn(ROWS, K, device=device).to(torch.bfloat16)
    return lambda: ops.linear(x, weight)


def fp8_linear(device, block_shape=None):
    data = torch.randn(N, K, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(N, device=device) if block_shape is None else torch.rand(1, 1).to(device)
    weight = ops.pack_fp8(data, scales, block_shape=block_shape)
    x = torch.randn(ROWS, K, device=device).to(torch.bfloat16)
    return lambda: ops.linear(x, weight)


def int4_linear(device):
    q = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scales, zeros = torch.rand(2, N, K // 64, device=device)
    weight = ops.pack_int4(q, scales, zeros * 15, 64)
    x = torch.randn(ROWS, K, device=device).to(torch.bfloat16)
    return lambda: ops.linear(x, weight)


def table4_linear(device):
    q = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scales = torch.rand(N, K // 64, device=device)
    weight = ops.pack_table4(q, scales, torch.randn(16, device=device), 64)
    x = torch.randn(ROWS, K, device=device).to(torch.bfloat16)
    return lambda: ops.linear(x, weight)


def attention(device, query_lens, dtype=torch.bfloat16):
    context, block = 40, 16
    cache = LayerCache.allocate((9, 2, block, 64), dtype, device)
    for data in (cache.keys, cache.values):
        data.copy_(torch.randn(data.shape).mul(9 if dtype == torch.int8 else 1))
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.fill_(0.1)
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(len(query_lens))]
    contexts = [context] * len(query_lens)
    metadata = build_attention_metadata(tables, query_lens, contexts, block, device)
    q = torch.randn(sum(query_lens), 4, 64, device=device).to(torch.bfloat16)
    return lambda: ops.paged_attention(q, cache, metadata, 0.125)


OPERATIONS = {
    "int8": int8_linear,
    "llm_int8": lambda device: int8_linear(device, 6.0),
    "fp8": fp8_linear,
    "fp8_blocks": lambda device: fp8_linear(device, (128, 128)),
    "int4": int4_linear,
    "nf4": table4_linear,
    "decode": lambda device: attention(device, [1, 1]),
    "decode_int8": lambda device: attention(device, [1, 1], torch.int8),
    "prefill": lambda device: attention(device, [7, 3]),
}


@cache
def default_of(module):
    return importlib.import_module(module).default_choice


def at_other_sizes(problem):
    """The problem itself, and where it is a linear layer's those of a large model."""
    yield problem
    if problem.sizes[:3] == (tuning.round_rows(ROWS), N, K):
        for rows in (1, 16, 32, 64, 128, 256, 1024, 8192):
            for shape in ((4096, 14336), (6144, 4096)):
                yield problem._replace(sizes=(rows, *shape, *problem.sizes[3:]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_choices_of_a_kernel(device, name):
    run = OPERATIONS[name](device)
    expected = run()
    with tuning.recording() as asked:
        run()
    assert asked, "the kernel asks for no choice"
    for problem, choice in asked.items():
        default = default_of(tuning._state.announced[problem.kernel].__module__)
        for facts, known in product(FACTS, at_other_sizes(problem)):
            choices = tuning.candidates(known, facts)
            assert 1 <= len(choices) <= MOST, known
            assert all(choices.count(other) == 1 for other in choices), known
            # Else what was measured to be best could not be recognised again.
            assert default(known, facts) in choices, known
        for other in tuning.candidates(problem, runtime.facts_of(expected)):
            if other == choice:
                continue
            try:
                with tuning.forced({problem: other}):
                    reason = measure.difference(run(), expected)
            except Exception as error:  # what cannot run here may run elsewhere
                if device.type == "cpu" and other.path == "triton":
                    raise AssertionError(f"{other} failed") from error
            else:
                assert reason is None, f"{other}: {reason}"
