"""The compiled library: loading it once, saying why if it is not there, and its C signatures."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.native_build import NativeBuildError, build

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_CODES = {**DTYPE_CODES, torch.int8: 3, torch.float8_e4m3fn: 4}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "rms_norm": [_I, _I, _P, _P, _P, _P, _L, _L, _L, _F, _I],
    "head_rms_norm": [_I, _I, _P, _P, _L, _L, _L, _L, _F, _I],
    "rotary_embedding": [_I, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _L, _I],
    "silu_and_mul": [_I, _P, _P, _L, _L, _I],
    "gelu_and_mul": [_I, _I, _P, _P, _L, _L, _I],
    "write_kv": [_P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _I],
    "move_kv": [_P, _P, _P, _P, _P, _P, _L, _L, _L, _L],
    "write_quantized": [_I, _I, _P, _P, _P, _P, _L, _L, _L, _L, _L, _I],
    "paged_attention": [_I, _I, _P, _I],
    "amx_attention": [_I, _P, _I],
    "int4_widen": [_I, _P, _P, _P, _L, _L, _L, _P, _I],
    "int4_linear": [_P, _L, _P, _P, _P, _L, _L, _L, _P, _P, _I],
    "panel_embedding": [_P, _P, _L, _L, _P, _I],
    "amx_linear": [_P, _I, _P, _L, _L, _I, _L, _F, _P, _I, _I],
    "panel_linear": [_P, _P, _L, _L, _I, _P, _L, _L, _P, _I, _I],
    "likeliest_shares": [_I, _P, _L, _L, _P, _P, _I],
    "replay": [_P, _L],
}


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether the native CPU kernels run here, whether they use AMX tiles, and why (not)."""

    available: bool
    amx: bool
    reason: str


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded = False
        self.library: ctypes.CDLL | None = None
        self.amx = False
        self.reason = ""


_state = _State()


def _load() -> None:
    with _state.lock:
        if _state.loaded:
            return
        if os.environ.get("AUTOTUNE_NATIVE", "1") == "0":
            _state.reason = "switched off by AUTOTUNE_NATIVE=0"
        else:
            try:
                library = ctypes.CDLL(str(build()))
                for name, arguments in _SIGNATURES.items():
                    function = getattr(library, name)
                    function.argtypes = arguments
                    function.restype = None
                library.enable_amx.argtypes = []
                library.enable_amx.restype = ctypes.c_int
                _state.amx = bool(library.enable_amx())
                _state.library = library
                _state.reason = "compiled for this CPU" + (", AMX tiles in use" * _state.amx)
            except (NativeBuildError, OSError, AttributeError) as error:
                _state.reason = str(error)
        _state.loaded = True


def library() -> ctypes.CDLL | None:
    """The native library, built and loaded at the first call; None where plain PyTorch must do."""
    if not _state.loaded:
        _load()
    return _state.library


def has_amx() -> bool:
    """Whether the AMX matmuls and attention can run in this process."""
    return library() is not None and _state.amx


def native_status() -> NativeStatus:
    """What runs on this CPU and why; for ``autotune doctor``."""
    available = library() is not None
    return NativeStatus(available, available and _state.amx, _state.reason)


@contextmanager
def replaced(by: ctypes.CDLL | None) -> Iterator[None]:
    """Another library inside the block."""
    kept = library()
    _state.library = by
    try:
        yield
    finally:
        _state.library = kept


def without_native() -> AbstractContextManager[None]:
    """Plain PyTorch inside the block: for tests and for measuring what the native code gains.

    Weights packed for the native matmuls before the block cannot be used inside it.
    """
    return replaced(None)


@contextmanager
def without_amx() -> Iterator[None]:
    """The native kernels as a CPU without AMX would run them, inside the block."""
    library()
    kept = _state.amx
    _state.amx = False
    try:
        yield
    finally:
        _state.amx = kept


def takes(x: Tensor) -> bool:
    """Whether the native kernels know this tensor's device and dtype."""
    return x.is_cpu and x.dtype in DTYPE_CODES
