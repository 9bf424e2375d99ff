"""The norms of queries and keys that some models apply before the rotary embedding."""

from typing import NamedTuple

from torch import Tensor


class HeadNorms(NamedTuple):
    """Weights [Dh] of the RMS norms of query and key heads, and the epsilon of both."""

    query: Tensor
    key: Tensor
    eps: float
