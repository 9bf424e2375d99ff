"""The GGUF container: what the library writes is read; what is broken is told in one sentence."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoints.gguf.file import GgufFile
from engine.errors import ModelError
from tests.engine.checkpoints.gguf_files import add_value

METADATA = {
    "a.text": "grün",
    "a.flag": True,
    "a.number": 7,
    "a.float": 0.25,
    "a.list": ["x", "y z"],
    "a.numbers": [3, 1, 2],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        add_value(writer, key, value)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def opened(data: bytes, folder: Path) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_metadata_and_tensors_are_what_was_written(written, tmp_path):
    file = opened(written, tmp_path)
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    one, two = file.tensors["one"], file.tensors["two"]
    assert (one.shape, one.type.name) == ((2, 3), "F32")
    assert (two.shape, two.type.name) == ((5,), "F16")
    assert one.type.floats(file.rows(one)).tolist() == [[0, 1, 2], [3, 4, 5]]
    file.forget()
    assert two.type.floats(file.rows(two)).tolist() == [[0, 1, 2, 3, 4]]


def test_a_file_cut_short_anywhere_is_refused(written, tmp_path):
    end = len(written.rstrip(b"\0"))  # padding after the last tensor may be missing
    for length in range(0, end - 8, 7):
        with pytest.raises(ModelError, match=r"truncated|empty|not a GGUF"):
            opened(written[:length], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"GGML" + d[4:], "not a GGUF file"),
        (lambda d: d[:4] + b"\1\0\0\0" + d[8:], "version 1"),
        (lambda d: d[:8] + b"\xff" * 8 + d[16:], "announces"),
        (lambda d: d[:16] + b"\xff" * 8 + d[24:], "announces"),
    ],
)
def test_a_header_that_lies_is_refused(written, tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        opened(change(written), tmp_path)


def test_an_unknown_tensor_type_is_named(written, tmp_path):
    at = written.index(b"one") + 3 + 4 + 2 * 8
    broken = written[:at] + (17).to_bytes(4, "little") + written[at + 4 :]
    with pytest.raises(ModelError, match=r"'one' is of GGUF type 17, which is not read; .*Q4_K"):
        opened(broken, tmp_path)


def test_a_row_that_is_no_whole_block_is_refused(written, tmp_path):
    at = written.index(b"one") + 3 + 4 + 2 * 8
    broken = written[:at] + (8).to_bytes(4, "little") + written[at + 4 :]
    with pytest.raises(ModelError, match=r"\[2, 3\]; Q8_0 needs rows of a multiple of 32"):
        opened(broken, tmp_path)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_never_escapes(written, tmp_path_factory, at, byte):
    """Whatever one wrong byte says, the file is read or refused, and nothing else happens."""
    at %= len(written)
    data = written[:at] + bytes([byte]) + written[at + 1 :]
    try:
        file = opened(data, tmp_path_factory.getbasetemp())
    except ModelError:
        return
    for info in file.tensors.values():
        info.type.floats(file.rows(info))
