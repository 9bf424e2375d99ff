"""Models quantized by a method that needs calibration: once, and then out of the user's cache.

The cache is `$XDG_CACHE_HOME/autotune/quantized/<digest>`, by the content of the model, the method
and the calibration text. A folder gets that name when it is finished; until then it is
`<digest>.partial`, which whoever comes next goes on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.checkpoints.model_folder import ModelFolder, open_model_folder
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.quantize.calibration_text import read_calibration_text
from engine.quantize.content_key import content_key
from engine.quantize.method_table import METHODS
from engine.quantize.options import WriteOptions
from engine.quantize.shard_writer import disk_errors, forget_progress
from engine.quantize.write_checkpoint import OnLayer, check_quantizable, write_checkpoint

# Half of what `autotune quantize` reads: it is waited for when a model is loaded.
CALIBRATION_TOKENS = 16384


def cache_folder() -> Path:
    """Where prepared models are: $XDG_CACHE_HOME/autotune/quantized, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    return home / "autotune" / "quantized"


def prepared_folder(
    config: EngineConfig,
    folder: ModelFolder,
    device: torch.device,
    on_layer: OnLayer | None = None,
) -> Path:
    """The folder of the model quantized as `config.quantization` says, made if it is not there.

    Groups are those of `int4`: of 64, asymmetric. `on_layer` is called only while it is made. Of
    several processes that want the same one makes it and the others wait.

    Raises:
        ConfigError: the model is quantized already, or the calibration text is unusable.
        ModelError: the model is broken, or has no tokenizer to read the text with.
        EnvironmentLacks: the cache's disk is full or cannot be written, or memory does not suffice.
    """
    method = config.quantization
    assert METHODS[method].calibrated
    options = check_quantizable(
        folder,
        WriteOptions(
            method=method,  # type: ignore[arg-type]
            symmetric=False if METHODS[method].weight_bits == 4 else None,
            calibration_tokens=CALIBRATION_TOKENS,
        ),
    )
    text = read_calibration_text(config.calibration)
    digest = content_key(folder, options, text).digest[:40]
    ready = cache_folder() / digest
    if _is_whole(ready):
        return ready
    with _held(ready.with_suffix(".lock")):
        if _is_whole(ready):
            return ready
        partial = ready.with_suffix(".partial")
        with disk_errors(ready.parent):
            shutil.rmtree(ready, ignore_errors=True)  # broken: a file is missing or cut off
        try:
            write_checkpoint(folder, options, text, partial, device=device, on_layer=on_layer)
        except ConfigError:
            # What is there is of no use to anybody, and would be in the way for ever.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        with disk_errors(ready.parent):
            forget_progress(partial)
            partial.replace(ready)
    return ready


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds a finished model, every file as long as its header says."""
    if not (folder / "config.json").is_file():
        return False
    try:
        open_model_folder(folder)
        SafetensorsFiles.open(folder)
    except ModelError:
        return False
    return True


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever has it; the system frees it if its holder dies."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
