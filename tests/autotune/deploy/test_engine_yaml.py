from pathlib import Path

import pytest

from autotune.deploy.engine_yaml import read_knobs
from autotune.errors import BadInput


def written(folder: Path, text: str) -> Path:
    path = folder / "engine.yaml"
    path.write_bytes(text.encode())
    return path


def test_only_what_the_file_sets_comes_back(tmp_path: Path) -> None:
    path = written(tmp_path, "max_num_seqs: 32 # why\nwatermark: 0\ntokenizer: null\n")
    assert read_knobs(path) == {"max_num_seqs": 32, "watermark": 0.0, "tokenizer": None}
    assert isinstance(read_knobs(path)["watermark"], float)
    assert read_knobs(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_num_seq: 32", "unknown knob 'max_num_seq'; did you mean max_num_seqs"),
        ("max-num-seqs: 32", "did you mean max_num_seqs"),
        ("max_num_seqs: many", "max_num_seqs must be of type int, got 'many'"),
        ("max_num_seqs: true", "must be of type int"),
        ("block_size: 17", "is not one of 8, 16"),
        ("watermark: .nan", "must be at least 0.0"),
        ("max_num_seqs: 64\nmax_num_batched_tokens: 32", "is below max_num_seqs=64"),
        ("max_num_seqs: 1\nmax_num_seqs: 2", "line 2: .*given twice"),
        ("max_num_seqs: [1", "line 1: not valid YAML"),
        ("- max_num_seqs", "expected lines of the form"),
        ("1: 2", "expected lines of the form"),
        ("max_num_seqs: !!python/object/apply:os.system ['false']", "not valid YAML"),
        ("max_num_seqs: \x00", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_by_name_and_reason(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput, match=f"{path}.*{said}"):
        read_knobs(path)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml does not exist"):
        read_knobs(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        read_knobs(tmp_path)
    path = tmp_path / "engine.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(BadInput, match="cannot be read"):
        read_knobs(path)
