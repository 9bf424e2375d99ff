"""The text: which files, which of them are held out, and the tokenizer trained on the rest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"

# The split of Llama 3: words with their leading space, digits by threes, runs of punctuation, and
# indentation kept whole, which is what makes source code cheap.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Roles stand in plain words: the models saw no dialogue, so reserved role tokens would be noise.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

SUFFIXES = (".py", ".rst", ".rst.txt", ".txt.rst")
# Third-party code has other licences; `pydoc_data` repeats the documentation and would leak
# held-out pages; the tables of `encodings` are numbers, not language.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "pydoc_data", "encodings", "cjkencodings"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
LARGEST_FILE = 1_500_000  # bytes; beyond it lie generated tables
HELD_OUT_ONE_IN = 50


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its path inside the text folder it came from, its kind and its text."""

    name: str
    kind: str  # "code", "test" or "prose"
    text: str

    @property
    def digest(self) -> int:
        """A number from the name alone: the order and the split do not depend on the machine."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")

    @property
    def held_out(self) -> bool:
        """Whether this file is never trained on."""
        return self.digest % HELD_OUT_ONE_IN == 0


def read_documents(folders: Iterable[Path]) -> list[Document]:
    """Every usable `.py` and `.rst` file under `folders`, once per distinct content."""
    found: list[Document] = []
    seen: set[str] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            if SKIPPED_FOLDERS.intersection(parts) or not path.name.endswith(SUFFIXES):
                continue
            if not path.is_file() or path.stat().st_size > LARGEST_FILE:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # deliberately broken encodings among the interpreter's own tests
            if len(text) < 200 or text in seen:
                continue
            seen.add(text)
            if not path.name.endswith(".py"):
                kind = "prose"
            elif TEST_FOLDERS.intersection(parts[:-1]):
                kind = "test"
            else:
                kind = "code"
            found.append(Document("/".join(parts), kind, text))
    return found


def cap_tests(documents: Sequence[Document], share: float = 0.5) -> list[Document]:
    """Drop test files, in an order fixed by name, until they are `share` of the code's size."""
    allowed = share * sum(len(d.text) for d in documents if d.kind == "code")
    kept = [d for d in documents if d.kind != "test"]
    for document in sorted((d for d in documents if d.kind == "test"), key=lambda d: d.digest):
        if len(document.text) <= allowed:
            allowed -= len(document.text)
            kept.append(document)
    return sorted(kept, key=lambda d: d.digest)


def held_out_excerpt(documents: Sequence[Document], size: int = 180_000) -> str:
    """Whole held-out files with their names, code and prose in turn, about `size` characters.

    Files that name a copyright of their own are left out: what is shipped carries one licence.
    """
    free = [d for d in documents if not re.search("copyright|licen[cs]e", d.text, re.IGNORECASE)]
    queues = [
        [d for d in free if d.kind in kinds and len(d.text) < size // 3]
        for kinds in (("prose",), ("code", "test"))
    ]
    chosen: list[str] = []
    total = 0
    while any(queues) and total < size:
        queue = max(queues, key=len) if not all(queues) else queues[len(chosen) % 2]
        document = queue.pop(0)
        piece = f"===== {document.name} =====\n\n{document.text.rstrip()}\n\n"
        if total + len(piece) <= size * 1.1:
            chosen.append(piece)
            total += len(piece)
    return "".join(chosen)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` entries; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, _id(tokenizer, BEGIN))],
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special token ids under the names of a Hugging Face `config.json`."""
    names = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    return {key: _id(tokenizer, token) for key, token in names.items()}


def _id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no {token} token; train it with this script")
    return int(number)


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[npt.NDArray[np.uint16]]:
    """Each document as `<begin> … <end>`, uint16 token ids."""
    end = _id(tokenizer, END)
    encodings = tokenizer.encode_batch([d.text for d in documents])
    return [np.asarray([*e.ids, end], dtype=np.uint16) for e in encodings]


def stream(
    encoded: Sequence[npt.NDArray[np.uint16]], repeats: Sequence[int], seed: int
) -> npt.NDArray[np.uint16]:
    """One long token stream of whole documents, each `repeats[i]` times, in a seeded order."""
    order = np.repeat(np.arange(len(encoded)), repeats)
    np.random.default_rng(seed).shuffle(order)
    return np.concatenate([encoded[int(i)] for i in order])
