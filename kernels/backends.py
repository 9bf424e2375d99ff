"""What a device may have of its own for each operation, and which backend a tensor's device has."""

import importlib
from functools import cache
from typing import Protocol

from torch import Tensor

from kernels.cpu import backend as cpu_backend
from kernels.head_norms import HeadNorms
from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import runtime


class Backend(Protocol):
    """Operations as ``kernels.ops`` describes them; plain PyTorch does what a backend declines.

    A function declines operands that it cannot take by returning None, or False where the result
    goes into its operands, and has then changed nothing. Backends are modules.
    """

    def rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor | None:
        """The norm of x, or of ``residual += x`` when a residual is given."""

    def head_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> bool:
        """Norm each head in place."""

    def rotary_embedding(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor
    ) -> bool:
        """Rotate in place."""

    def rotary_and_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin_cache: Tensor,
        cache: LayerCache,
        slots: Tensor,
        norms: HeadNorms | None = None,
    ) -> bool:
        """Norm if asked and rotate q in place; store keys so treated, and values."""

    def write_kv(self, k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> bool:
        """Store keys and values at their slots."""

    def move_kv(self, cache: LayerCache, sources: Tensor, targets: Tensor) -> bool:
        """Copy keys and values from slots to slots."""

    def silu_and_mul(self, x: Tensor) -> Tensor | None:
        """``silu(gate) * up``."""

    def gelu_and_mul(self, x: Tensor, approximate: str) -> Tensor | None:
        """``gelu(gate) * up``."""

    def route(self, logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor] | None:
        """The experts of each token and their weights."""

    def paged_attention(
        self,
        q: Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        scale: float,
        window: int,
        soft_cap: float,
    ) -> Tensor | None:
        """Causal attention over paged contexts."""


@cache
def _triton_backend() -> Backend:
    # Imported when first needed: a machine without a GPU has no use for Triton and may lack it.
    backend: Backend = importlib.import_module("kernels.triton.backend")
    return backend


def backend_for(x: Tensor) -> Backend:
    """The backend of the device that holds x; the CPU's declines every other device's tensors."""
    return _triton_backend() if runtime.runs_on(x) else cpu_backend
