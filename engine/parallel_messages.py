"""What the driver writes to another rank's standard input, and what that answers.

A message is one byte for its kind, eight for its length, and its bytes: a command as JSON, or a
step of the model or of its draft model as its header's integers and its words
(`engine.packed_step`), int64. Answers are lines of JSON.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError, EngineError, EnvironmentLacks, ModelError
from engine.packed_step import StepHeader

_FRAME = struct.Struct("<cq")
_HEADER = struct.Struct(f"<{len(StepHeader._fields)}q")
_STEP, _DRAFT_STEP, _COMMAND = b"S", b"D", b"C"
_ERRORS = {error.__name__: error for error in (ConfigError, ModelError, EnvironmentLacks)}


@dataclass(frozen=True, slots=True)
class Command:
    """Something else than a step: its name and plain JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """A step; words int64 [header.num_words]. `draft`: it is the draft model's."""

    header: StepHeader
    words: Tensor
    draft: bool


def command_bytes(name: str, arguments: dict[str, Any]) -> bytes:
    """The message of a command."""
    body = json.dumps([name, arguments]).encode()
    return _FRAME.pack(_COMMAND, len(body)) + body


def step_bytes(header: StepHeader, words: Tensor, draft: bool) -> bytes:
    """The message of a step; words int64 [header.num_words], on the host."""
    body = words.numpy().tobytes()
    frame = _FRAME.pack(_DRAFT_STEP if draft else _STEP, _HEADER.size + len(body))
    return b"".join((frame, _HEADER.pack(*header), body))


def read_message(stream: BinaryIO) -> Command | Step | None:
    """The next message; None where the stream ends, be it within a message."""
    frame = stream.read(_FRAME.size)
    if len(frame) < _FRAME.size:
        return None
    kind, length = _FRAME.unpack(frame)
    body = bytearray(length)
    if stream.readinto(body) < length:  # type: ignore[attr-defined]
        return None
    if kind == _COMMAND:
        name, arguments = json.loads(body)
        return Command(name, arguments)
    header = StepHeader(*_HEADER.unpack_from(body))
    words = torch.from_numpy(np.frombuffer(body, np.int64, offset=_HEADER.size))
    return Step(header, words, kind == _DRAFT_STEP)


def error_line(error: BaseException, text: str) -> bytes:
    """The answer of a rank that failed, with what a person should read."""
    kind = next((c.__name__ for c in _ERRORS.values() if isinstance(error, c)), "EngineError")
    return json.dumps({"error": kind, "message": text}).encode() + b"\n"


def loaded_line() -> bytes:
    """The answer of a rank that has its weights."""
    return b'{"loaded": true}\n'


def read_answer(line: bytes) -> EngineError | None:
    """The error that an answer tells; None: the weights are loaded."""
    answer = json.loads(line)
    if "error" not in answer:
        return None
    error: EngineError = _ERRORS.get(answer["error"], EngineError)(answer["message"])
    return error
