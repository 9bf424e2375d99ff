"""Tensor parallelism: what the ranks of one model say to each other.

Every rank holds a part of each matrix and computes every step (Shoeybi et al. 2019, Megatron-LM):
matrices are cut by output features and then by input features in turn, so that one sum over the
ranks follows attention and one the MLP. All ranks run the same code in the same order; what the
driver (rank 0) is asked to do it first tells the others (`tell`, `step`), where both do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor

from engine.collective_clock import NO_SECONDS, CollectiveClock, CollectiveSeconds
from engine.errors import EngineError, EnvironmentLacks, first_line
from engine.packed_step import StepHeader

_T = TypeVar("_T")
# Much of it is untyped: process groups are made here without the global one around them.
dist: Any = torch.distributed

# No step takes so long; a rank that is alive and never comes is a fault.
COLLECTIVE_TIMEOUT = timedelta(seconds=600)
# Seconds for NCCL to let go of a group.
LEAVING = 5.0
# Ranks are told to meet when all have loaded, so that they come at once.
MEETING_TIMEOUT = timedelta(seconds=60)


class Ranks(Protocol):
    """The ranks of a model as one of them sees them.

    Tensors that are summed or gathered are contiguous and of one shape and dtype on all ranks.
    """

    @property
    def rank(self) -> int:
        """Which rank this is; 0 is the driver."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place; returns x."""
        ...

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """The first `columns` of what all ranks have side by side; [S, n] -> [S, columns]."""
        ...

    def minimum(self, value: int) -> int:
        """The least of all ranks' values."""
        ...

    def tell(self, command: str, **arguments: Any) -> None:
        """The driver: let the others do this too; `arguments` are plain JSON."""
        ...

    def step(self, header: StepHeader, words: Tensor, draft: bool = False) -> None:
        """The driver: let the others compute this step; words as in `engine.packed_step`.

        `draft`: it is the draft model's.
        """
        ...

    def lockstep(self) -> contextlib.AbstractContextManager[None]:
        """Around sums over the ranks: whoever fails inside has left the others waiting for ever.

        So that fails the model on all ranks, which must be loaded again. On the driver a Ctrl-C
        waits for the end.

        Raises:
            EngineError: a rank failed, here or before.
        """
        ...

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """The driver: around what is told, and then done; a Ctrl-C waits for its end."""
        ...

    @property
    def failure(self) -> EngineError | None:
        """Why the ranks are of no more use, if they are not."""
        ...

    @property
    def collective_seconds(self) -> CollectiveSeconds | None:
        """What sums and gathers have taken so far, as this rank saw it; None where not timed."""
        ...

    def check(self, error: Exception | None = None) -> None:
        """Raise the failure, if there is one.

        With an error of the device there is one always: a rank is lost, or the others wait for
        this one. A device's waiting ends when the ranks are given up, with any result, so check
        after it.

        Raises:
            EngineError: the ranks are of no more use.
        """
        ...

    def close(self) -> None:
        """The driver: end the others. No step can be computed any more."""
        ...


class Alone:
    """One rank that has everything."""

    rank = 0
    size = 1
    failure = None
    collective_seconds = NO_SECONDS
    _nothing = contextlib.nullcontext()

    def all_reduce(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """The first `columns` of x."""
        return x[:, :columns]

    def minimum(self, value: int) -> int:
        """value."""
        return value

    def tell(self, command: str, **arguments: Any) -> None:
        """Nobody is there."""

    def step(self, header: StepHeader, words: Tensor, draft: bool = False) -> None:
        """Nobody is there."""

    def lockstep(self) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return self._nothing

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return self._nothing

    def check(self, error: Exception | None = None) -> None:
        """Nothing: nobody waits."""

    def close(self) -> None:
        """Nothing."""


ALONE = Alone()


class GroupRanks:
    """Ranks that are joined by a process group: NCCL on GPUs, gloo on CPUs.

    The group is none of `torch.distributed`'s global ones: a process may hold several models, and
    groups of its own. A rank that is not the driver is told what to do, and ends where it fails.
    """

    failure: EngineError | None = None

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._group: Any = None
        self._clock = CollectiveClock(runs=device.type == "cpu")

    def join(self, meeting: Path) -> None:
        """Meet the other ranks at a file that does not exist yet, in a folder of our own.

        Raises:
            RanksLost: not all of them came.
        """
        store = dist.FileStore(str(meeting), self.size)
        store.set_timeout(MEETING_TIMEOUT)
        try:
            if self._device.type == "cuda":
                self._group = _nccl(store, self.rank, self.size)
            else:
                self._group = _gloo(store, self.rank, self.size)
            self.minimum(0)  # NCCL connects with the first sum
            self._clock.calibrate(lambda floats: self._sum(torch.zeros(floats)))
        except RuntimeError as error:
            self._failed(error)

    @property
    def collective_seconds(self) -> CollectiveSeconds | None:
        """What sums and gathers have taken so far; None on a GPU."""
        return self._clock.seconds

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place; returns x."""
        self._clock.time(x.nbytes, lambda: self._sum(x))
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """The first `columns` of what all ranks have side by side; [S, n] -> [S, columns]."""
        rows, each = x.shape
        parts = x.new_empty(self.size * rows, each)
        own = x.contiguous()
        self._clock.time(
            parts.nbytes, lambda: self._wait(lambda: self._group._allgather_base(parts, own))
        )
        starts = range(0, columns, each)
        pieces = zip(parts.view(self.size, rows, each), starts, strict=False)
        return torch.cat([part[:, : columns - start] for part, start in pieces], dim=1)

    def minimum(self, value: int) -> int:
        """The least of all ranks' values."""
        x = torch.tensor([value], dtype=torch.int64, device=self._device)
        self._wait(lambda: self._group.allreduce([x], _options(dist.ReduceOp.MIN)))
        return int(x)

    def tell(self, command: str, **arguments: Any) -> None:
        """Only the driver tells."""

    def step(self, header: StepHeader, words: Tensor, draft: bool = False) -> None:
        """Only the driver tells."""

    def lockstep(self) -> contextlib.AbstractContextManager[None]:
        """What fails inside ends this rank."""
        return _fatal()

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """Only the driver is interrupted."""
        return contextlib.nullcontext()

    def check(self, error: Exception | None = None) -> None:
        """A rank that is not the driver waits for no device."""

    def close(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is not None:
            leave(group)

    def abort(self) -> None:
        """End what waits for other ranks, from any thread."""
        group = self._group
        if group is not None:
            _abort(group)

    def _sum(self, x: Tensor) -> None:
        self._wait(lambda: self._group.allreduce([x], _options(dist.ReduceOp.SUM)))

    def _wait(self, start: Callable[[], Any]) -> None:
        """On a GPU the stream waits, not the host."""
        try:
            work = start()
            if work is not None:
                work.wait()
        except (RuntimeError, AttributeError) as error:  # the latter: another thread closed it
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Say what is known of why the ranks do not answer.

        Raises:
            RanksLost: always.
        """
        raise RanksLost(
            f"rank {self.rank} of {self.size} lost the other ranks: {first_line(error)}"
        ) from error


class RankFailed(EngineError):
    """A rank failed where the others wait for it."""


class RanksLost(EngineError):
    """The other ranks do not answer, for a reason that only they know."""


@contextlib.contextmanager
def _fatal() -> Iterator[None]:
    try:
        yield
    except RanksLost:
        raise
    except Exception as error:
        raise RankFailed(f"{type(error).__name__}: {first_line(error)}") from error


def all_or_none(ranks: Ranks, attempt: Callable[[], _T]) -> _T:
    """The outcome of an attempt that counts only if it succeeds on every rank.

    Raises:
        EnvironmentLacks: here or on another rank.
    """
    failure: EnvironmentLacks | None = None
    outcome: list[_T] = []
    try:
        outcome.append(attempt())
    except EnvironmentLacks as error:
        failure = error
    if ranks.minimum(0 if failure is not None else 1):
        return outcome[0]
    outcome.clear()
    raise failure or EnvironmentLacks(
        "the memory of another rank does not suffice: lower kv_cache_memory_bytes or "
        "gpu_memory_utilization, or free that device"
    )


def can_connect(device: torch.device) -> bool:
    """Whether this build of PyTorch can join ranks on such devices."""
    if not dist.is_available():
        return False
    found = dist.is_nccl_available() if device.type == "cuda" else dist.is_gloo_available()
    return bool(found)


def leave(group: Any) -> None:
    """Leave a process group, whether the others are still there or not."""
    # NCCL's shutdown waits for the others, gloo's does not.
    if _is_gloo(group):
        with contextlib.suppress(RuntimeError, AttributeError):
            group.shutdown()
    else:
        _abort(group)


def _abort(group: Any) -> None:
    """End what waits for other ranks.

    NCCL does that at once, and then waits until no captured graph that sums over the ranks is alive
    (NVIDIA, "CUDA Graphs: Process Hang"). Whoever asks may be holding one, so another thread waits.
    """

    def abort() -> None:
        with contextlib.suppress(RuntimeError, AttributeError):
            group.abort()

    if _is_gloo(group):
        abort()
        return
    waiting = threading.Thread(target=abort, name="leaving NCCL", daemon=True)
    try:
        waiting.start()
    except RuntimeError:
        # The process is ending, which takes no threads from Python 3.12 on, and the group with it:
        # its destructor would wait too, so it must not run.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        return
    waiting.join(LEAVING)


def _is_gloo(group: Any) -> bool:
    return dist.is_gloo_available() and isinstance(group, dist.ProcessGroupGloo)


def _options(operation: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    if hasattr(options, "asyncOp"):
        options.asyncOp = False  # on the current stream: no event between it and NCCL's own
    return options


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = COLLECTIVE_TIMEOUT
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


# PyTorch would end the process where a rank is lost; here the driver is to say which, and go on.
_NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = COLLECTIVE_TIMEOUT
    with _environment(_NCCL_SETTINGS):  # read when a group is made
        return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for a moment, where they are not set."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
