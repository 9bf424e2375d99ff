"""NF4: four bits that name quantiles of a normal distribution, under one scale a block.

Source: Dettmers et al. 2023, QLoRA, section 3 ("4-bit NormalFloat Quantization") and appendix E,
which lists the 16 values. Each block is divided by its largest magnitude and every element becomes
the nearest value of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.forms import TableForm

# Quantiles of N(0, 1) at evenly spaced probabilities, eight on the side of zero and above and
# eight below, scaled to [-1, 1]; asymmetric so that zero itself is one of them.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize_nf4(weight: Tensor, group_size: int = 64) -> TableForm:
    """`w ~ table[q] * scale`, `scale = max|w|` of `group_size` neighbours along K.

    weight float [N, K], K a multiple of `group_size` -> scales float32 [N, K / group_size]. Where
    K is a multiple of the block these are the blocks of the flattened tensor, as in the paper. A
    block of zeros has scale 1.
    """
    rows, columns = weight.shape
    table = torch.tensor(NF4_TABLE, dtype=torch.float32, device=weight.device)
    groups = weight.float().reshape(rows, columns // group_size, group_size)
    scales = groups.abs().amax(dim=2)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    between = (table[1:] + table[:-1]) / 2
    q = torch.bucketize(groups / scales[..., None], between)
    return TableForm(q.to(torch.uint8).reshape(rows, columns), scales, table, group_size)
