from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner, Result

from autotune.cli.exits import guarded
from autotune.cli.knob_options import chosen_knobs, knob_help, parse_bytes, with_knobs
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError

app = typer.Typer(rich_markup_mode=None)
received: list[tuple[float, dict[str, Any]]] = []


@app.command()
@guarded
@with_knobs(without=("seed",))
def work(
    rate: Annotated[float, typer.Option(help="Own option.")] = 1.0, *, knobs: dict[str, Any]
) -> None:
    """Work."""
    received.append((rate, knobs))


def run(*arguments: str) -> Result:
    received.clear()
    return CliRunner().invoke(app, list(arguments))


def test_only_what_is_set_arrives() -> None:
    assert run().exit_code == 0
    assert received == [(1.0, {})]
    assert run("--rate", "2", "--max-num-seqs", "256").exit_code == 0
    assert received == [(2.0, {"max_num_seqs": 256})]


def test_every_knob_but_those_left_out_has_an_option() -> None:
    command: Any = get_command(app)
    options = {option: p for p in command.params for option in p.opts}
    for name, knob in KNOBS.items():
        if name == "seed":
            assert knob.flag not in options
            continue
        option = options[knob.flag]
        assert option.help == knob_help(knob)
        assert knob.help in option.help
        if knob.type is bool:
            assert option.secondary_opts == [f"--no-{knob.flag[2:]}"]


def test_help_tells_range_unit_default_and_device() -> None:
    assert knob_help(KNOBS["max_num_seqs"]).endswith("(1 to 4096 sequences; default 256)")
    assert knob_help(KNOBS["enable_prefix_caching"]).endswith("(default true)")
    assert "(cpu only; 1 to 1024 threads)" in knob_help(KNOBS["num_threads"])
    assert "8|16|32|64|128" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize(
    ("arguments", "knobs"),
    [
        (["--enable-prefix-caching"], {"enable_prefix_caching": True}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--block-size", "32"], {"block_size": 32}),
        (["--quantization", "int8"], {"quantization": "int8"}),
        (["--watermark", "0.1"], {"watermark": 0.1}),
        (["--kv-cache-memory-bytes", "1.5GiB"], {"kv_cache_memory_bytes": 3 << 29}),
        (["--model", "a folder"], {"model": "a folder"}),
    ],
)
def test_values_have_the_knobs_types(arguments: list[str], knobs: dict[str, Any]) -> None:
    assert run(*arguments).exit_code == 0
    assert received[0][1] == knobs
    assert [type(v) for v in received[0][1].values()] == [type(v) for v in knobs.values()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--block-size", "17"], "block_size=17 is not one of 8, 16, 32, 64, 128"),
        (["--quantization", "int5"], "not one of none, int8, int4"),
        (["--max-num-seqs", "0"], "at least 1 sequences"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "8"], "below max_num_seqs=64"),
        (["--kv-cache-memory-bytes", "4 gigs"], "write for instance 4GiB"),
        (["--watermark", "nan"], "at least 0.0"),
        (["--config", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_bad_values_end_with_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert received == []


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("max_num_seqs: 8\nenable_prefix_caching: false\nseed: 3\n")
    assert run("--config", str(path), "--max-num-seqs", "16").exit_code == 0
    expected = {"max_num_seqs": 16, "enable_prefix_caching": False, "seed": 3}
    assert received[0][1] == expected


def test_unknown_knobs_of_the_file_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("max_num_sequences: 8\n")
    result = run("--config", str(path))
    assert result.exit_code == 2
    assert "max_num_seqs" in result.stderr
    assert "engine.yaml" in result.stderr


def test_file_and_flags_together_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("max_num_batched_tokens: 512\n")
    with pytest.raises(ConfigError, match="below max_num_seqs=1024"):
        chosen_knobs(path, {"max_num_seqs": 1024})
    # The whole is judged, not the parts: alone, this file would contradict the default.
    path.write_text("max_num_batched_tokens: 64\nmax_num_seqs: 64\n")
    assert chosen_knobs(path, {"max_num_seqs": 32})["max_num_seqs"] == 32


def test_a_flag_may_mend_what_the_file_alone_would_contradict(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("max_num_batched_tokens: 64\n")  # below the default max_num_seqs
    assert EngineConfig.from_mapping(chosen_knobs(path, {"max_num_seqs": 32})).max_num_seqs == 32


def test_a_command_without_a_place_for_the_knobs_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="knobs"):
        with_knobs()(lambda: None)


@settings(deadline=None)
@given(st.integers(0, 1 << 50))
def test_plain_numbers_of_bytes_are_exact(number: int) -> None:
    assert parse_bytes(str(number)) == number
    assert parse_bytes(f"{number} KiB") == number * 1024


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1..5GiB", "1e9", "4 potatoes", "inf", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="4GiB"):
        parse_bytes(text)
