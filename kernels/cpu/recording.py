"""Native calls of a piece of work, written down once and made again without Python.

For one token of a small model Python takes longer to find the operands of a kernel than the kernel
takes. Work that always makes the same calls on the same memory, as the steps of one shape do, need
not be gone through again: what CUDA graphs are to a GPU.
"""

import ctypes
import threading
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpu import native

T = TypeVar("T")

_MOST_ARGUMENTS = 16
# What PyTorch does beside the kernels without writing anything that is read: making room for
# results, and checking values. Views are other names for what is there.
_HARMLESS = {
    "aten::_local_scalar_dense",
    "aten::aminmax",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::item",
}


class NotRecordable(Exception):
    """The work does something that is not a native call; says what."""


class _Slot(ctypes.Union):
    _fields_: ClassVar = [
        ("integer", ctypes.c_int64),
        ("number", ctypes.c_double),
        ("pointer", ctypes.c_void_p),
    ]


class _Call(ctypes.Structure):
    """``Call`` of ``native/replay.cpp``."""

    _fields_: ClassVar = [("function", ctypes.c_void_p), ("arguments", _Slot * _MOST_ARGUMENTS)]


class Recording(Generic[T]):
    """Work that was done once and can be done again on the same memory.

    ``result`` is what it returned; tensors in it are written anew each time.
    """

    def __init__(
        self, result: T, calls: list[_Call], arguments: list[Any], made: list[Tensor]
    ) -> None:
        self.result = result
        self._calls = (_Call * len(calls))(*calls)
        self._count = len(calls)
        self._kept = arguments  # the calls have their addresses, as they have those of
        self._made = made
        library = native.library()
        assert library is not None
        self._replay = library.replay

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of what the work makes, which stay taken."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in self._made}
        return sum(storage.nbytes() for storage in storages.values())

    def replay(self) -> T:
        """Do the work again, on what its inputs now hold."""
        self._replay(self._calls, self._count)
        return self.result


def record(work: Callable[[], T]) -> Recording[T]:
    """Do ``work``, which must make the same native calls whenever it is done.

    What it reads must outlive the recording, and stay where it is; that does not go for what it
    makes. As many threads as now will work on it.

    Raises:
        NotRecordable: there is no native library, or PyTorch itself computes something.
    """
    outcome = _attempt(work)
    if not isinstance(outcome, Recording):
        raise NotRecordable(outcome[1])
    return outcome


def _attempt(work: Callable[[], T]) -> Recording[T] | tuple[T, str]:
    """Do the work once; its recording, or its result and why it has none."""
    library = native.library()
    if library is None:
        return work(), native.native_status().reason
    recorder = _Recorder(library)
    with _only_one, native.replaced(cast("ctypes.CDLL", recorder)), _Watch() as watch:
        result = work()
    if watch.foreign is not None:
        return result, f"{watch.foreign} is no native kernel"
    return Recording(result, recorder.calls, recorder.kept, watch.made)


class Recordings(Generic[T]):
    """Recorded work by a key, as much of it as ``most_bytes`` hold; the oldest goes first.

    Work that cannot be recorded, or is too large for that to matter, is simply done.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._known: dict[Hashable, Recording[T] | None] = {}
        self._held = 0
        self._refused = False

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` returns, be it done or replayed: a tensor may be written anew by the next.

        Of a key the work is always the same, on memory that lives at least as long as the key.
        """
        if self._refused:
            return work()
        key = key, torch.get_num_threads()
        if key in self._known:
            known = self._known[key]
            return work() if known is None else known.replay()
        outcome = _attempt(work)
        if not isinstance(outcome, Recording):
            self._refused = True
            return outcome[0]
        recording = outcome
        size = recording.nbytes
        if size > self._most_bytes // 8:
            self._known[key] = None
            return recording.result
        while self._held + size > self._most_bytes:
            oldest = next(k for k, held in self._known.items() if held is not None)
            gone = self._known.pop(oldest)
            self._held -= 0 if gone is None else gone.nbytes
        self._known[key] = recording
        self._held += size
        return recording.result


_only_one = threading.Lock()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps all tensors that are made, and notes an operation that computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []
        self.foreign: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: PyTorch would import its compiler, for seconds, to say so."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        made = (
            [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else []
        )
        is_view = bool(made) and all(_shares(args[0], x) for x in made)
        if name not in _HARMLESS and (func._schema.is_mutable or not is_view):
            self.foreign = self.foreign or name
        if not is_view:
            self.made += made
        return out


def _shares(x: Any, view: Tensor) -> bool:
    if not isinstance(x, Tensor):
        return False
    return x.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


class _Recorder:
    """Stands in for the library: makes each call and writes it down.

    Other threads' calls pass through.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._thread = threading.get_ident()
        self.calls: list[_Call] = []
        self.kept: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> None:
            function(*arguments)
            if threading.get_ident() == self._thread:
                self._note(name, function.argtypes, arguments)

        return call

    def _note(self, name: str, types: list[type], arguments: tuple[Any, ...]) -> None:
        again = getattr(self._library, f"replay_{name}")
        noted = _Call()
        noted.function = ctypes.cast(again, ctypes.c_void_p).value
        for slot, kind, value in zip(noted.arguments, types, arguments, strict=False):
            if kind is ctypes.c_float:
                slot.number = value
            elif kind is not ctypes.c_void_p:
                slot.integer = int(value)
            elif value is None or isinstance(value, int):
                slot.pointer = value
            else:  # byref of a structure
                slot.pointer = ctypes.addressof(value._obj)
                self.kept.append(value)
        self.calls.append(noted)
