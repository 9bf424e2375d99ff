"""One rank that is not the driver: loads its part of the model and does as it is told.

Run as `python -m engine.parallel_worker ARGUMENTS`, JSON of `Arguments`; see
`engine.parallel_messages` for what it reads and answers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engine.config import EngineConfig
from engine.errors import EngineError, EnvironmentLacks, first_line
from engine.loading import load_part
from engine.models.decoder import Decoder
from engine.parallel import GroupRanks, RankFailed, RanksLost
from engine.parallel_messages import Command, Step, error_line, loaded_line, read_message
from engine.parallel_processes import LOST
from engine.quantize.quality import TextFollower
from engine.runner import ModelRunner, set_threads


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a rank is started with.

    `weights`: the folder that the weights are in. `device` is "cpu" or "cuda". `meeting` is a file
    at which the ranks meet, `lifeline` a descriptor that ends when the driver does.
    """

    rank: int
    size: int
    config: dict[str, Any]
    weights: str
    device: str
    meeting: str
    lifeline: int


class Worker:
    """Follows the driver: what it computes, this rank computes with its part of the weights."""

    def __init__(self, decoder: Decoder, ranks: GroupRanks, meeting: Path) -> None:
        self._decoder = decoder
        self._ranks = ranks
        self._meeting = meeting
        self._runner: ModelRunner | None = None
        self._text = TextFollower(decoder)

    def serve(self, messages: BinaryIO) -> None:
        """Do as told until the stream ends.

        Raises:
            EngineError: this rank failed where the others wait for it.
        """
        while (message := read_message(messages)) is not None:
            if isinstance(message, Step):
                assert self._runner is not None
                follow = self._runner.follow_draft if message.draft else self._runner.follow
                with self._ranks.lockstep():
                    follow(message.header, message.words)
                continue
            try:
                self._obey(message)
            except (RankFailed, RanksLost):
                raise
            except EngineError:
                # What the ranks agreed to refuse; the driver tells it.
                continue

    def _obey(self, command: Command) -> None:
        arguments = command.arguments
        if command.name == "join":
            self._ranks.join(self._meeting)
        elif command.name == "run":
            config = EngineConfig.from_mapping(arguments["config"])
            self._runner = ModelRunner(self._decoder, config, arguments["max_model_len"])
        elif command.name == "move_kv":
            assert self._runner is not None
            self._runner.move_kv(**arguments)
        elif command.name == "score":
            with self._ranks.lockstep():
                self._text.obey(**arguments)
        else:
            assert self._runner is not None
            config = EngineConfig.from_mapping(arguments["config"])
            if command.name == "reconfigure":
                self._runner.reconfigure(config, arguments["max_model_len"])
            else:
                assert command.name == "apply_live", command.name
                self._runner.apply_live(config)


def main() -> None:
    """Load, answer, and serve; the answers go to what was standard output."""
    arguments = Arguments(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, args=(arguments,), daemon=True).start()
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not fall between the answers
    try:
        _run(arguments, answers)
    except RanksLost:
        os._exit(LOST)
    except Exception as error:
        os.write(answers, error_line(_kind(error), _text(arguments, error)))
        os._exit(1)
    # Nothing is to be saved, and destructors of what waits for other ranks may wait too.
    os._exit(0)


def _run(arguments: Arguments, answers: int) -> None:
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", arguments.rank)
        torch.cuda.set_device(device)
    config = EngineConfig.from_mapping(arguments.config)
    set_threads(config, device, arguments.size)
    ranks = GroupRanks(arguments.rank, arguments.size, device)
    decoder = load_part(config, Path(arguments.weights), device, ranks)
    os.write(answers, loaded_line())
    Worker(decoder, ranks, Path(arguments.meeting)).serve(sys.stdin.buffer)


def _end_with_driver(arguments: Arguments) -> None:
    """End this process when the driver has gone, and remove what that could not."""
    os.read(arguments.lifeline, 1)  # nothing is ever written there
    shutil.rmtree(Path(arguments.meeting).parent, ignore_errors=True)
    os._exit(2)


def _kind(error: Exception) -> Exception:
    cause = error.__cause__ if isinstance(error, RankFailed) else error
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
        return EnvironmentLacks(str(cause))
    return cause if isinstance(cause, Exception) else error


def _text(arguments: Arguments, error: Exception) -> str:
    where = f"rank {arguments.rank} of {arguments.size}"
    if isinstance(error, EngineError) and not isinstance(error, RankFailed):
        return f"{where}: {error}"
    text = str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
    return f"{where} failed ({first_line(EngineError(text))}): load the model again"


if __name__ == "__main__":
    main()
