"""Small integers packed into 32-bit words, least significant bits first."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Words that hold `count` integers of `bits` bits without gaps."""
    return -(-count * bits // WORD)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, words_for(count, bits)] -> uint8 [R, count]; integer i starts at bit `i * bits`.

    `bits` is 1..8. Where it does not divide 32, integers cross from a word into the next.
    """
    rows = words.shape[0]
    # The bytes of a word in memory are in the order of its bits on every machine that is served.
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[:, :count].contiguous()
    if 8 % bits == 0:
        mask = (1 << bits) - 1
        parts = [(octets >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).view(rows, -1)[:, :count].contiguous()
    # Eight integers fill `bits` bytes, and an integer lies in at most two neighbouring bytes.
    whole = -(-count // 8)
    wanted = whole * bits
    padded = torch.nn.functional.pad(octets[:, :wanted], (0, max(0, wanted - octets.shape[1]) + 1))
    out = torch.empty(rows, whole, 8, dtype=torch.uint8, device=words.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        low = padded[:, byte : byte + wanted : bits][:, :whole].to(torch.int16)
        high = padded[:, byte + 1 : byte + 1 + wanted : bits][:, :whole].to(torch.int16)
        out[:, :, i] = (((high << 8) | low) >> shift) & ((1 << bits) - 1)
    return out.view(rows, -1)[:, :count].contiguous()


def add_to_words(words: Tensor, constants: tuple[int, ...]) -> Tensor:
    """`words` [R, W] int32 plus `constants`, repeated along W, modulo 2**32.

    Adding to the packed word lets a carry run into the next integer, which undoes the borrow of the
    packed subtraction that wrote it; adding to each integer would not.
    """
    added = torch.tensor(constants).repeat(-(-words.shape[1] // len(constants)))
    total = (words.long() + added[: words.shape[1]]) & 0xFFFFFFFF
    return (total - ((total >> 31) << 32)).to(torch.int32)
