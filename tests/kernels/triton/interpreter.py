"""Triton's interpreter, made to compute as the compiled code does.

It multiplies bfloat16 matrices as the integers that hold them, and rounds floats half up without
carrying into the exponent. Both are replaced by PyTorch's conversions, which are exact.

And it replaces the builtins of Triton's language at every launch and at every call of a function
that a kernel calls, and makes a table of types wherever it needs one of them, which took longer
than all that the kernels compute: here both are done once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
HELD_IN = {
    kind.name: interpreter._get_np_dtype(kind)
    for kind in (
        *(tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32),
        *(tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.float8e4nv, tl.float8e5),
    )
}
HOLDERS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16)}


def held_in(kind: tl.dtype) -> np.dtype:
    """The type of the array that holds values or pointers of a type of Triton's."""
    scalar = kind.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else HELD_IN[scalar.name]


def to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The interpreter's array of a float type as a tensor of that type."""
    data = np.ascontiguousarray(data)
    kind = FLOATS[str(dtype)]
    if kind.itemsize > 2 or data.dtype == np.float16:
        return torch.from_numpy(data.copy())
    holder, held = HOLDERS[kind.itemsize]
    return torch.from_numpy(data.view(holder).copy()).view(held).view(kind)


def to_numpy(x: torch.Tensor, dtype: tl.dtype) -> np.ndarray:
    """The inverse: an array of the type in which the interpreter holds `dtype`."""
    wanted = interpreter._get_np_dtype(dtype)
    if x.dtype.itemsize > 2:
        return x.numpy()
    return x.view(HOLDERS[x.dtype.itemsize][1]).numpy().view(wanted)


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: Any) -> np.ndarray:
    """Round to nearest even, or widen; float8 saturates as the hardware's conversion does."""
    x = to_torch(data, source.scalar)
    kind = FLOATS[str(target.scalar)]
    if kind == torch.float8_e4m3fn:
        x = torch.where(x.isnan(), x.float(), x.float().clamp(-448, 448))
    return to_numpy(x.to(kind), target.scalar)


def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Products and sums of floats in float32, whatever holds them."""

    def wide(x: Any) -> np.ndarray:
        if not x.dtype.scalar.is_floating():
            return x.data
        return to_torch(x.data, x.dtype.scalar).to(torch.float32).numpy()

    product = np.matmul(wide(a), wide(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def cast(self: Any, source: Any, target: tl.dtype) -> Any:
    """Conversions between floats, and between floats and integers."""
    before, after = source.dtype.scalar, target.scalar
    data = source.data
    if before.is_floating() and after.is_floating():
        return interpreter.TensorHandle(convert(data, before, after, None), after)
    if before.is_floating():
        data = to_torch(data, before).double().numpy()
    elif after.is_floating():
        return interpreter.TensorHandle(
            to_numpy(torch.from_numpy(np.asarray(data)).to(FLOATS[str(after)]), after), after
        )
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(after)), after)


def patch_tensor(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
    """A scalar is an integer, where Triton 3.6 holds it in an array that NumPy does not convert."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


@contextmanager
def replaced_builtins() -> Iterator[None]:
    """The language's builtins are the interpreter's, from here to the block's end."""
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with _replaced(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope()):
            yield
    finally:
        scope.restore()


@contextmanager
def repaired() -> Iterator[None]:
    """The interpreter with these repairs, inside the block."""
    builder = interpreter.InterpreterBuilder
    with (
        _replaced(interpreter, "_convert_float", convert),
        _replaced(interpreter, "_get_np_dtype", held_in),
        _replaced(interpreter, "_patch_lang_tensor", patch_tensor),
        _replaced(builder, "create_dot", dot),
        _replaced(builder, "cast_impl", cast),
        replaced_builtins(),
        np.errstate(all="ignore"),  # infinities and NaN are no news on a GPU
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
