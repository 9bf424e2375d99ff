"""Work that is recorded and replayed against the same work done again."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from kernels import cpu, ops
from kernels.cpu.recording import NotRecordable, Recordings, _Watch, record
from kernels.layer_cache import LayerCache
from kernels.metadata import build_attention_metadata

pytestmark = pytest.mark.skipif(
    not cpu.native_status().available, reason="no native kernels on this machine"
)


class Block:
    """An attention block with a dense or a quantized layer, over memory that stays where it is."""

    def __init__(self, dtype: torch.dtype, cached: torch.dtype) -> None:
        self.tokens = torch.tensor([3, 1, 2])
        self.positions = torch.tensor([20, 9, 25])
        self.metadata = build_attention_metadata(
            [[1, 2], [4, 0], [3, 5]], [1, 1, 1], [21, 10, 26], 16
        )
        self.cache = LayerCache.allocate((6, 1, 16, 64), cached)
        self.table = torch.randn(64, 64)
        self.norm = torch.randn(128).to(dtype)
        self.x = torch.randn(3, 128).to(dtype)
        self.residual = torch.randn(3, 128).to(dtype)

    def run(self) -> Tensor:
        x, _ = ops.add_rms_norm(self.x, self.residual, self.norm, 1e-5)
        q, k = x[:, :64].view(3, 1, 64), x[:, 64:].view(3, 1, 64)
        ops.rotary_and_write_kv(
            q, k, k, self.positions, self.table, self.cache, self.metadata.slots
        )
        out = ops.paged_attention(q, self.cache, self.metadata, 0.125)
        return ops.silu_and_mul(out.reshape(3, 64))

    def change(self) -> None:
        self.x.normal_()
        self.positions += 1
        self.metadata.context_lens += 1
        self.metadata.slots += 1
        self.residual.normal_()


@pytest.mark.parametrize(
    ("dtype", "cached"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.float16, torch.float8_e4m3fn),
    ],
)
def test_what_is_replayed_is_what_is_computed(dtype: torch.dtype, cached: torch.dtype) -> None:
    block = Block(dtype, cached)
    recording = record(block.run)
    for _ in range(3):
        block.change()
        before = block.residual.clone(), block.cache.keys.clone()
        expected = block.run().clone()
        after = block.residual.clone(), block.cache.keys.clone()
        block.residual.copy_(before[0])
        block.cache.keys.copy_(before[1])
        recording.result.zero_()
        assert recording.replay() is recording.result
        assert torch.equal(recording.result, expected)
        assert torch.equal(block.residual, after[0])
        assert torch.equal(block.cache.keys.float(), after[1].float())


@pytest.mark.skipif(not cpu.has_amx(), reason="int8 is native on AMX alone")
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear_layers(rows: int) -> None:
    x = torch.randn(rows, 128).bfloat16()
    ids = torch.arange(rows)
    dense = ops.pack_dense(torch.randn(96, 128).bfloat16(), torch.randn(96).bfloat16())
    whole = ops.pack_int8(
        torch.randint(-100, 100, (64, 96), dtype=torch.int8), torch.rand(64), None
    )

    def work() -> tuple[Tensor, Tensor]:
        return ops.linear(ops.linear(x, dense), whole), ops.embedding(ids, dense)

    recording = record(work)
    x.normal_()
    ids.copy_(ids.flip(0))
    for mine, expected in zip(recording.replay(), work(), strict=True):
        assert torch.equal(mine, expected)


def test_recording_does_not_import_a_compiler() -> None:
    # PyTorch wraps such a method to keep its compiler away, and imports it, for seconds, to do so.
    watching = _Watch.__torch_dispatch__
    assert not hasattr(watching, "__wrapped__")


def test_what_pytorch_computes_cannot_be_recorded() -> None:
    x = torch.randn(4, 64)

    def computed() -> Tensor:
        return ops.silu_and_mul(x) + 1.0

    def written() -> Tensor:
        return ops.silu_and_mul(x).mul_(2.0)

    def gathered() -> Tensor:
        return ops.silu_and_mul(x)[torch.tensor([1, 2])]

    for work, name in ((computed, "add"), (written, "mul_"), (gathered, "index")):
        with pytest.raises(NotRecordable, match=f"aten::{name} is no native kernel"):
            record(work)
    with cpu.without_native(), pytest.raises(NotRecordable):
        record(lambda: ops.silu_and_mul(x))
    assert torch.equal(record(lambda: ops.silu_and_mul(x)[1:3]).replay(), ops.silu_and_mul(x)[1:3])


def test_calls_of_other_threads_are_theirs() -> None:
    x, other = torch.randn(4, 64), torch.randn(4, 64)

    def work() -> Tensor:
        beside = threading.Thread(target=ops.silu_and_mul, args=(other,))
        beside.start()
        beside.join()
        return ops.silu_and_mul(x)

    recording = record(work)
    assert len(recording) == 1


def test_recordings_are_kept_as_far_as_they_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 64)
    done: list[int] = []

    def work(rows: int) -> Tensor:
        done.append(rows)
        return ops.silu_and_mul(x[:rows])

    def ran(rows: int) -> bool:
        """Whether the work itself was done, its result being right in any case."""
        done.clear()
        result = recordings.run(rows, lambda: work(rows))
        assert torch.equal(result, ops.silu_and_mul(x[:rows]))
        return bool(done)

    recordings: Recordings[Tensor] = Recordings(most_bytes=8 * 2 * 32 * 4)
    assert [ran(1), ran(1), ran(2), ran(1), ran(2)] == [True, False, True, False, False]
    assert [ran(3), ran(3)] == [True, True]  # too large
    for rows in (1, 2):
        x.normal_()
        assert not ran(rows)
    narrow: Recordings[Tensor] = Recordings(most_bytes=8 * 32 * 4)
    for _ in range(2):
        for key in range(9):  # the ninth takes the place of the first
            done.clear()
            narrow.run(key, lambda: work(1))
            assert done == [1]
    recordings = Recordings(1 << 20)
    assert [ran(1), ran(1)] == [True, False]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert [ran(1), ran(1)] == [True, False]  # by other threads


def test_work_that_cannot_be_recorded_is_done_once_each_time() -> None:
    x = torch.randn(4, 64)
    done: list[int] = []

    def work() -> Tensor:
        done.append(1)
        return x + 1.0

    recordings: Recordings[Tensor] = Recordings(1 << 20)
    for count in (1, 2, 3):
        assert torch.equal(recordings.run("a", work), x + 1.0)
        assert len(done) == count
