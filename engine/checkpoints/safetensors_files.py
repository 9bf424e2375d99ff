"""Tensors of a model folder, in one or several safetensors files, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoints.json_file import read_json_object
from engine.errors import ModelError
from engine.quantize.forms import DenseForm, LinearForm

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LONGEST_NAME = 255  # bytes; file systems raise beyond that
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The last is a power of two in a byte, the scale of newer FP8 checkpoints.
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


class SafetensorsFiles:
    """Named tensors over the shards of a folder: a `TensorSource` of floats.

    Readers of quantized formats take their parts from it by `raw`. Files are mapped when their
    first tensor is read, and unmapped by `release`; a tensor returned by `read` is a view of the
    map and keeps it alive, so copy what should outlive it.
    """

    def __init__(self, folder: Path, shard_of: dict[str, Path], listed_in: Path) -> None:
        self.folder = folder
        self._shard_of = shard_of
        self._listed_in = listed_in
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> SafetensorsFiles:
        """Find the safetensors of `folder` and check every header.

        Raises:
            ModelError: none are there (pickles are refused with the reason), the index is missing,
                broken or leaves the folder, a shard is missing, or a file is truncated or corrupt.
        """
        index_path = folder / INDEX_FILE
        if (folder / SINGLE_FILE).is_file():
            return cls.of_file(folder / SINGLE_FILE)
        if index_path.is_file():
            return cls(folder, _read_index(folder, index_path), index_path)
        named_otherwise = sorted(folder.glob("*.safetensors"))
        if len(named_otherwise) == 1 and "-of-" not in named_otherwise[0].name:
            # Older quantizers name the one file after what they did.
            return cls.of_file(named_otherwise[0])
        if named_otherwise:
            raise ModelError(
                f"{folder} has {', '.join(path.name for path in named_otherwise[:4])}"
                f"{' and more' if len(named_otherwise) > 4 else ''} but no {INDEX_FILE}, which "
                "says what each file holds"
            )
        if any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise ModelError(
                f"{folder} holds its weights only as pickles (.bin, .pt), which can run any code "
                "when they are opened and are refused: convert them to safetensors"
            )
        raise ModelError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")

    @classmethod
    def of_file(cls, path: Path) -> SafetensorsFiles:
        """The tensors of one file.

        Raises:
            ModelError: it is truncated or corrupt.
        """
        return cls(path.parent, dict.fromkeys(_names(path), path), path)

    @property
    def quantization(self) -> str | None:
        """None: tensors are read as they are stored."""
        return None

    @property
    def notes(self) -> list[str]:
        """None: nothing is read otherwise than it is stored."""
        return []

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> Iterable[str]:
        """All tensors, in no order that means anything."""
        return self._shard_of.keys()

    def problem(self, name: str, text: str) -> ModelError:
        """An error on the tensor `name`, which names the file that holds it."""
        return ModelError(f"{self._shard_of.get(name, self._listed_in)}: tensor {name!r} {text}")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name`, in the checkpoint's dtype and mapped from its file.

        Raises:
            ModelError: no such tensor, another shape than `shape`, or not a float dtype.
        """
        if name not in self:
            raise ModelError(f"{self._listed_in} has no tensor {name!r} of shape {list(shape)}")
        tensor = self._get(name)
        if tuple(tensor.shape) != shape:
            raise self.problem(
                name, f"has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise self.problem(
                name, f"is of {_dtype_name(tensor.dtype)}; float32, bfloat16 or float16 is wanted"
            )
        return tensor

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The float weight [N, K] of the linear layer `prefix`.

        Raises:
            ModelError: as `read`.
        """
        return DenseForm(self.read(f"{prefix}.weight", shape))

    def dtype(self, name: str) -> str:
        """The stored dtype in safetensors' spelling ("F8_E4M3"), from the header alone."""
        try:
            return str(self._handle(self._shard_of[name]).get_slice(name).get_dtype())
        except (SafetensorError, OSError) as error:
            raise self.problem(name, f"cannot be read: {error}") from error

    def raw(self, name: str, dtypes: Iterable[torch.dtype], *shapes: tuple[int, ...]) -> Tensor:
        """The tensor `name` as it is stored, a part of a quantized layer.

        It must be of one of `dtypes`, and of one of `shapes` if any are given.

        Raises:
            ModelError: no such tensor, unreadable, or of another dtype or shape.
        """
        if name not in self:
            wanted = f" of shape {list(shapes[0])}" if shapes else ""
            raise ModelError(
                f"{self._listed_in} has no tensor {name!r}{wanted}, which the quantized layer needs"
            )
        tensor = self._get(name)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(_dtype_name(dtype) for dtype in dtypes)
            raise self.problem(name, f"is of {_dtype_name(tensor.dtype)}; {wanted} is wanted")
        if shapes and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.problem(
                name, f"has shape {list(tensor.shape)}; the layer and its format ask for {wanted}"
            )
        return tensor

    def scales(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """Scales as float32.

        Raises:
            ModelError: as `raw`, or some are infinite or not a number.
        """
        values = self.raw(name, SCALE_DTYPES, *shapes).float()
        if not bool(torch.isfinite(values).all()):
            raise self.problem(name, "holds scales that are infinite or not a number")
        return values

    def release(self) -> None:
        """Unmap all files; they are mapped again when a tensor is read."""
        self._open.clear()

    def _get(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._handle(self._shard_of[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self.problem(name, f"cannot be read: {error}") from error
        return tensor

    def _handle(self, path: Path) -> Any:
        handle = self._open.get(path)
        if handle is None:
            handle = self._open[path] = safe_open(path, framework="pt")
        return handle


def _names(path: Path) -> list[str]:
    """Tensor names in one file; opening it checks the header against the file's size."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ModelError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {error}"
        ) from error


def _read_index(folder: Path, index_path: Path) -> dict[str, Path]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path} has no weight_map of tensor names to files")
    held: dict[Path, set[str]] = {}
    shard_of: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise ModelError(
                f"{index_path}: tensor {name!r} is said to be in {file!r}; a file in the model's "
                "folder is wanted"
            )
        path = folder / file
        if path not in held:
            if not path.is_file():
                raise ModelError(
                    f"{path} is missing: {index_path.name} says it holds tensor {name!r}"
                )
            held[path] = set(_names(path))
        if name not in held[path]:
            raise ModelError(f"{path} has no tensor {name!r}, though {index_path.name} says so")
        shard_of[name] = path
    return shard_of


def _stays_inside(file: str) -> bool:
    # A hub cache links its files out of the folder, so links are followed; names must not climb.
    path = Path(file)
    if len(file.encode(errors="replace")) > _LONGEST_NAME:
        return False
    return bool(file) and not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
