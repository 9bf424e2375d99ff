"""The embedded default models: a small Llama-architecture target, its draft, and held-out text.

The folders are ordinary Hugging Face folders (`config.json`, `model.safetensors`,
`tokenizer.json`); `MODEL_CARD.md` beside this file says what they were trained on and what they
reach. Importing this module reads nothing and imports no framework.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: Folder of the target: 11M parameters, bf16, vocabulary 4096, 2048 positions.
TARGET = _HERE / "target"
#: Folder of the draft: 1.1M parameters, bf16, trained on the same text with the same tokenizer.
DRAFT = _HERE / "draft"
#: Text that neither model was trained on: whole files, each under a `===== name =====` line.
HELD_OUT = _HERE / "held_out.txt"

__all__ = ["DRAFT", "HELD_OUT", "TARGET"]
