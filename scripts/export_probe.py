"""Reads exported commands with an engine's own parser; run by that engine's interpreter.

Usage: export_probe.py vllm|sglang|lmdeploy|openvino CASES

CASES has a JSON object a line: `words`, the command with the config file, `flags`, the same
without one, and `settings`, the keys with their values. For each a JSON line comes back: `ok`, or
`problem`. It imports nothing of autotune.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = dict[str, Any]


def vllm() -> Callable[[Case], None]:
    """vLLM's parser of `vllm serve`, and its check of the whole configuration."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))

    def check(case: Case) -> None:
        parsed = parser.parse_args(case["words"][1:])
        parser.parse_args(case["flags"][1:])
        if case["whole"]:
            AsyncEngineArgs.from_cli_args(parsed).create_engine_config()

    return check


def sglang() -> Callable[[Case], None]:
    """SGLang's parser, its reader of config files and its record of arguments."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    merger = ConfigArgumentMerger(parser)

    def check(case: Case) -> None:
        merged = parser.parse_args(merger.merge_config_with_args(case["words"][3:]))
        flags = parser.parse_args(case["flags"][3:])
        if merged != flags:
            raise ValueError("the config file says something else than the flags")
        ServerArgs.from_cli_args(merged)

    return check


def lmdeploy() -> Callable[[Case], None]:
    """LMDeploy's parser and its check of TurboMind's configuration."""
    from dataclasses import fields

    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe
    from lmdeploy.messages import TurbomindEngineConfig

    SubCliServe.add_parsers()
    names = {field.name for field in fields(TurbomindEngineConfig)}

    def check(case: Case) -> None:
        parsed = CLI.parser.parse_args(case["words"][1:])
        given = {k: v for k, v in vars(parsed).items() if k in names and v is not None}
        TurbomindEngineConfig(**given)

    return check


def openvino() -> Callable[[Case], None]:
    """The scheduler's settings of OpenVINO GenAI, which the model server hands on."""
    from openvino_genai import SchedulerConfig

    # These are the server's own, or the plugin's.
    elsewhere = {"target_device", "kv_cache_precision", "draft_source_model"}

    def check(case: Case) -> None:
        config = SchedulerConfig()
        for key, value in case["settings"].items():
            if key not in elsewhere:
                if getattr(config, key) != value:
                    setattr(config, key, value)
                if getattr(config, key) != value:
                    raise ValueError(f"{key} is not {value}")

    return check


def main() -> None:
    """Check every case."""
    known = {"vllm": vllm, "sglang": sglang, "lmdeploy": lmdeploy, "openvino": openvino}
    check = known[sys.argv[1]]()
    with Path(sys.argv[2]).open(encoding="utf-8") as cases:
        for line in cases:
            try:
                check(json.loads(line))
                answer = {"ok": True}
            except SystemExit:
                answer = {"problem": "the parser refuses it"}
            except Exception as error:  # whatever the engine raises is its answer
                answer = {"problem": f"{type(error).__name__}: {error}"}
            print("CASE " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
