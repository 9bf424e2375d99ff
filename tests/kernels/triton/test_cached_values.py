"""The assembly that unpacks 8-bit pairs, by a small interpreter of its instructions."""

import numpy as np
import pytest
import torch

from kernels.triton import cached_values


def run(code: str, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Execute on arrays of 32-bit registers; $2 holds `words`, $0 and $1 are returned."""
    registers: dict[str, np.ndarray] = {"$2": words}

    def value(name: str) -> np.ndarray:
        return np.full_like(words, int(name, 16)) if name.startswith("0x") else registers[name]

    def halves(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x).view(np.float16).reshape(-1, 2)

    for line in code.strip("{}\n").splitlines():
        operation, *names = line.strip().rstrip(";").replace(",", " ").split()
        if operation == ".reg":
            continue
        if operation == "mov.b32" and names[0].startswith("{"):
            registers[names[0][1:]] = value(names[2]) & 0xFFFF
            registers[names[1][:-1]] = value(names[2]) >> 16
            continue
        target, *sources = names
        if operation.startswith(("shl", "shr")):
            x, by = value(sources[0]), np.uint32(int(sources[1]))
            registers[target] = x << by if operation.startswith("shl") else x >> by
            continue
        given = [value(name) for name in sources[:2]]
        if operation == "mov.b32":
            result = given[0]
        elif operation == "prmt.b32":
            both = np.stack([given[0], given[1]], 1).view(np.uint8).reshape(-1, 8)
            chosen = [int(digit) for digit in reversed(sources[2][2:])]
            result = np.ascontiguousarray(both[:, chosen]).view(np.uint32)[:, 0]
        elif operation == "sub.f16x2":
            result = (halves(given[0]) - halves(given[1])).view(np.uint32)[:, 0]
        elif operation == "cvt.rn.f16x2.e4m3x2":
            pair = given[0].astype(np.uint16).view(np.uint8)
            floats = torch.from_numpy(pair.copy()).view(torch.float8_e4m3fn).half().numpy()
            result = floats.view(np.uint32)
        else:
            combine = {"xor.b32": np.bitwise_xor, "and.b32": np.bitwise_and}
            result = combine.get(operation, np.bitwise_or)(*given)
            assert operation in (*combine, "or.b32")
        registers[target] = result
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize(
    ("code", "dtype", "missing"),
    [
        (cached_values.INT8_BITS, torch.int8, 1),
        (cached_values.E4M3_BITS, torch.float8_e4m3fn, 256),
        (cached_values.E4M3_CONVERSIONS, torch.float8_e4m3fn, 1),
    ],
)
def test_every_pair_of_elements(code, dtype, missing):
    elements = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = elements[elements.float().isfinite()].view(torch.uint8)
    pairs = torch.cartesian_prod(finite, finite)
    pairs = torch.cat([pairs, pairs[: len(pairs) % 2]])
    words = torch.cat([pairs, pairs.flip(1)], 1).numpy().view(np.uint32)[:, 0]
    even, odd = (
        torch.from_numpy(x.view(np.float16).reshape(-1, 2).copy()) for x in run(code, words)
    )
    expected = torch.cat([pairs, pairs.flip(1)], 1).view(dtype).float()
    assert torch.equal(even.float() * missing, expected[:, 0::2])
    assert torch.equal(odd.float() * missing, expected[:, 1::2])


@pytest.mark.parametrize("kind", [cached_values.PLAIN, cached_values.INT8, cached_values.E4M3])
@pytest.mark.parametrize("head_dim", [16, 24, 80, 128])
def test_tiles_hold_a_head_and_fill_a_matrix_instruction(kind: int, head_dim: int) -> None:
    columns = cached_values.columns_of(head_dim, kind)
    elements = columns if kind == cached_values.PLAIN else 2 * columns
    assert elements >= head_dim
    assert columns >= 16, "what a product sums over at a time"
