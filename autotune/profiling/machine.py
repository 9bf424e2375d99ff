"""What this machine does to this model: ceilings, and the parts of a step measured alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotune.profiling.schema import (
    AttentionProbe,
    Ceilings,
    LinearProbe,
    ModelFacts,
    Probes,
)
from engine.config import EngineConfig
from engine.quantize.method_table import METHODS

if TYPE_CHECKING:
    import torch

    from engine.loading import LoadedModel

# How the budget is shared out.
CEILINGS_SHARE = 0.1
LINEARS_SHARE = 0.45
LARGEST_STEP = 8192
LONGEST_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class MachineCalibration:
    """Ceilings of the device and probes of the model's parts on it."""

    ceilings: Ceilings
    probes: Probes


def calibrate_machine(
    loaded: LoadedModel,
    config: EngineConfig,
    model: ModelFacts,
    methods: Sequence[str],
    cache_dtypes: Sequence[str],
    *,
    budget_s: float = 8.0,
    say: Callable[[str], None] = lambda _: None,
) -> MachineCalibration:
    """Measure the machine with a loaded model; nothing may be running on it.

    Args:
        loaded: the model, as `config` serves it.
        config: the config that it was loaded with.
        model: its facts, for the bytes of its weights.
        methods: values of `quantization` that may be predicted, the most important first. One that
            needs calibration is measured by the one whose kernels it shares.
        cache_dtypes: values of `kv_cache_dtype` that may be predicted.
        budget_s: seconds that all of it may take. A budget that is too short for everything leaves
            out the last methods, and has fewer rounds.
        say: told what is being measured.
    """
    from engine.kv_cache import CACHE_DTYPES
    from engine.step_probes import probe_attention, probe_linears

    begin = time.perf_counter()
    decoder = loaded.runner.decoder
    device = decoder.device
    say("measuring memory bandwidth and arithmetic")
    ceilings = _ceilings(device, decoder.dtype, config, model, CEILINGS_SHARE * budget_s)
    own = config.quantization
    say("measuring linear layers")
    others = dict.fromkeys(stand_in(method) for method in methods)
    quantized = own == "none" and model.quantization is not None
    linears = probe_linears(
        decoder,
        own,
        [] if quantized else [method for method in others if method not in (own, stand_in(own))],
        min(LARGEST_STEP, max(config.max_num_batched_tokens, config.max_num_seqs)),
        config.max_num_seqs,
        LINEARS_SHARE * budget_s,
    )
    say("measuring attention")
    names = dict.fromkeys([config.kv_cache_dtype, *cache_dtypes])
    dtypes: dict[str, torch.dtype] = {name: CACHE_DTYPES.get(name, decoder.dtype) for name in names}
    attention = probe_attention(
        decoder,
        dtypes,
        config.block_size,
        min(LONGEST_CONTEXT, model.max_model_len),
        config.max_num_seqs,
        max(0.2 * budget_s, budget_s - (time.perf_counter() - begin)),
    )
    return MachineCalibration(
        ceilings,
        Probes(
            linears=[
                LinearProbe(
                    method=times.method,
                    rows=times.rows,
                    layers_s=times.layers_s,
                    head_s=times.head_s,
                )
                for times in linears
            ],
            attention=[
                AttentionProbe(
                    kv_cache_dtype=name,
                    sequences=times.sequences,
                    contexts=times.contexts,
                    seconds=times.seconds,
                    chunk_tokens=times.chunk_tokens,
                    chunk_contexts=times.chunk_contexts,
                    chunk_seconds=times.chunk_seconds,
                )
                for name, times in attention.items()
            ],
            seconds=time.perf_counter() - begin,
        ),
    )


def stand_in(method: str) -> str:
    """The method without calibration that ends in the same kernels as this one."""
    known = METHODS[method]
    if not known.calibrated:
        return method
    return next(
        other.name
        for other in METHODS.values()
        if not other.calibrated
        and (other.weight_bits, other.activation) == (known.weight_bits, known.activation)
    )


def _ceilings(
    device: torch.device,
    dtype: torch.dtype,
    config: EngineConfig,
    model: ModelFacts,
    budget_s: float,
) -> Ceilings:
    """Of the types that the engine multiplies in: the model's own, and that of its method."""
    import torch

    from kernels.limits import launch_cost, matmul_rate, memory_bandwidth

    activation = METHODS[config.quantization].activation
    own = str(dtype).removeprefix("torch.")
    # On a CPU e4m3 is widened to the model's dtype.
    fp8 = "float8_e4m3fn" if device.type == "cuda" else own
    wanted = {"float": own, "int8": "int8", "fp8": fp8}[activation]
    share = budget_s / 4
    matmul: dict[str, float] = {}
    for name in dict.fromkeys((own, wanted)):
        rate = matmul_rate(getattr(torch, name), device, share)
        if rate is not None:
            matmul[name] = rate
    compute_dtype = wanted if wanted in matmul else own
    bandwidth = memory_bandwidth(device, share)
    working_set = memory_bandwidth(device, share, model.weight_bytes)
    return Ceilings(
        bandwidth=bandwidth,
        working_set_bandwidth=working_set,
        matmul=matmul,
        compute_dtype=compute_dtype,
        ridge=matmul[compute_dtype] / working_set,
        launch_cost_s=launch_cost(device, graph=False),
        graph_launch_cost_s=launch_cost(device, graph=True),
    )
