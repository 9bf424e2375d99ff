"""What a router sees of a request: how many sequences it asks for, and how its prompts begin.

A router has no tokenizer. Texts are therefore cut into blocks of bytes, prompts of token ids into
blocks of tokens; equal beginnings have equal names, whatever follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct, error
from typing import Any

from engine.block_tables import salt_of
from engine.server.request_fields import MOST_CHOICES

# Tokens that one name stands for: the engine's own default block.
BLOCK_TOKENS = 16
# Bytes of a block of text, of tokens of about four bytes; how many it takes to be a block matters
# to nobody but for how finely prompts are told apart.
BLOCK_BYTES = 64
_TOKEN_BYTES = 8
_DIGEST_BYTES = 16

Names = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    `sequences` is how many outputs are generated at once. `prompts` are the names of each prompt's
    whole blocks: a name tells a block and all that stands before it.
    """

    sequences: int = 1
    prompts: tuple[Names, ...] = ()


NOTHING_KNOWN = Asked()


def read_asked(body: bytes) -> Asked:
    """What the body of a request to generate or to tokenize asks for.

    A body that is no such thing is nothing known: whoever serves it says what is wrong with it.
    """
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            return NOTHING_KNOWN
        beginnings = list(_beginnings(fields))
    except (ValueError, RecursionError):
        return NOTHING_KNOWN
    n = fields.get("n")
    several = min(n, MOST_CHOICES) if type(n) is int and n > 0 else 1
    salt = fields.get("cache_salt")
    # Prompts of two salts share nothing at the engine either.
    apart = salt_of(salt) if isinstance(salt, str) else b""
    return Asked(max(1, len(beginnings)) * several, tuple(_names(*b, apart) for b in beginnings))


def _beginnings(fields: dict[str, Any]) -> Iterator[tuple[bytes, int]]:
    """The bytes of each prompt, and how many of them are a block."""
    messages, prompt = fields.get("messages"), fields.get("prompt")
    if isinstance(messages, list):
        # Templates put tools before messages. Each message stands for itself, so that a longer
        # conversation begins as the shorter one did.
        ahead = [fields.get("tools"), fields.get("chat_template_kwargs")]
        yield _text("\n".join(json.dumps(part, sort_keys=True) for part in [*ahead, *messages]))
    elif isinstance(prompt, str):
        yield _text(prompt)
    elif isinstance(prompt, list):
        several = prompt if prompt and isinstance(prompt[0], (list, str)) else [prompt]
        for one in several:
            if isinstance(one, str):
                yield _text(one)
            elif isinstance(one, list):
                yield _tokens(one)


def _text(text: str) -> tuple[bytes, int]:
    # Lone surrogates, which JSON can spell, are no reason to fail here.
    return text.encode("utf-8", "surrogatepass"), BLOCK_BYTES


def _tokens(token_ids: Sequence[Any]) -> tuple[bytes, int]:
    try:
        packed = Struct(f"{len(token_ids)}q").pack(*token_ids)
    except error:  # not all are integers of 64 bits
        packed = b""
    return packed, BLOCK_TOKENS * _TOKEN_BYTES


def _names(data: bytes, size: int, salt: bytes) -> Names:
    """BLAKE2b over the name of what comes before and the block, as `BlockTables.digest` does it."""
    names = []
    name = size.to_bytes(_TOKEN_BYTES) + salt  # texts and tokens share no name
    for start in range(0, len(data) - size + 1, size):
        name = blake2b(name + data[start : start + size], digest_size=_DIGEST_BYTES).digest()
        names.append(name)
    return tuple(names)
