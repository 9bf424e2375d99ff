"""Which GGUF file a user means by a path."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError

_VISION = "mmproj"  # the image part of a model, beside the file that is meant


def find_gguf(path: Path) -> Path | None:
    """The file itself, or the only GGUF file of a folder that holds no safetensors; else None.

    Raises:
        ModelError: a folder holds several.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" else None
    if next(path.glob("*.safetensors"), None) is not None:
        return None
    files = sorted(f for f in path.glob("*.gguf") if _VISION not in f.name)
    if len(files) > 1:
        names = ", ".join(f.name for f in files[:8])
        raise ModelError(f"{path} holds several GGUF files ({names}): give the path of one of them")
    return files[0] if files else None
