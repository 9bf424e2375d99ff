"""One step's time on one rank of a model that is known by its sizes alone, part by part.

    device = sum over linear layers of roofline(bytes / bandwidth, operations / rate) + latency
           + elementwise traffic + output head + attention + sums over the ranks

Each product has a roofline of its own, not the model as a whole: in a step that is bound by memory
on the whole the wide products may still be bound by arithmetic. The two times of a product are
joined as the measured ones are (`autotune.predict.curves.ROOFLINE_POWER`): an H200's bf16 product
of 16384 x 8192 and 256 rows takes 89 us, where reading alone takes 64 us and arithmetic alone 82.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autotune.planning.device_rates import DeviceRates
from autotune.planning.model_shape import Amount, Linear, ModelShape
from autotune.predict.curves import ROOFLINE_POWER, Curve
from engine.config import EngineConfig
from engine.quantize.method_table import METHODS, Activation

# Kernels of a layer beside matrix products and attention: two norms, rotation with the cache's
# write, and the gate. Experts add the router, and what chooses and sorts them: a token's take 24 us
# on an H200 where reading takes 2 (Qwen3-30B-A3B in eighths, AIConfigurator's kernel database). A
# latent adds two norms and the products that are absorbed into query and output.
_LAYER_KERNELS, _EXPERT_KERNELS, _LATENT_KERNELS = 4, 7, 4
# Features of an expert at which its products lose half of their rate to tiles that they do not fill
# (the same database: 96 features reach 0.34 to 0.4 of what wide products do, 768 reach 0.63).
_NARROW = 64
# Rows are rounded in norms and gates as a rule, and in kernels of their own for the rest.
_ROUNDING_KERNELS = 2
# Elements that these read and write for a token: norms and residuals 10 times the hidden features,
# the gate its inputs and its output, rotation the queries twice.
_HIDDEN_PASSES, _GATE_PASSES, _QUERY_PASSES = 10, 3, 2
# Sampling passes over the logits: written, widened to float32, reduced.
_LOGIT_BYTES = 12
# int8 with its outlier columns in floats is two products and a sum (LLM.int8(), table 2: slower
# than floats on small models).
_OUTLIER_COST = 1.5
# Rows at which curves are told: denser than the roofline turns.
_ROWS = (1, 2, 3, 4, 6, *(round(8 * 1.26**power) for power in range(36)))


def joined(read: Amount, compute: Amount) -> Amount:
    """Seconds of a kernel that reads and computes at the same time."""
    power = ROOFLINE_POWER
    seconds: Amount = (read**power + compute**power) ** (1.0 / power)
    return seconds


def reading_share(read: float, compute: float) -> float:
    """How much of `joined` a small saving of reading saves in proportion; the rest is arithmetic's.

    The elasticity of the roofline, as in `Curve.split`.
    """
    if read <= 0:
        return 0.0
    return float(1.0 / (1.0 + (max(compute, 0.0) / read) ** ROOFLINE_POWER))


class Product(NamedTuple):
    """A matrix product of a layer as one rank computes it, in so many `layers` alike.

    `weight_seconds` is what reading one copy takes, `row_seconds` the arithmetic of a row, and
    `row_bytes` its traffic beside the weights, in seconds.
    """

    layers: int
    copies: int
    weight_seconds: float
    row_seconds: float
    row_traffic: float
    latency: float


@dataclass(frozen=True, slots=True)
class StepParts:
    """Seconds of a step's parts on one rank; functions of rows, sequences and tokens seen."""

    shape: ModelShape
    config: EngineConfig
    rates: DeviceRates
    products: tuple[Product, ...]
    head: Product
    elementwise: float  # seconds a row
    latency: float  # of the kernels beside products and attention, of all layers
    kernels: int  # of a step, to be launched one by one where it is not captured

    @classmethod
    def of(cls, shape: ModelShape, config: EngineConfig, rates: DeviceRates) -> StepParts:
        """The parts under a config.

        Raises:
            KeyError: a quantization that does not exist.
        """
        ranks = config.tensor_parallel_size
        products = []
        kernels, beside = 2, 0  # the head and the sampler
        each = _LAYER_KERNELS + _LATENT_KERNELS * (shape.latent is not None)
        each += _ROUNDING_KERNELS * (_activation(shape, config) != "float")
        for kind in shape.layer_kinds():
            for linear in shape.linears(kind.has_experts):
                product = _product(shape, config, rates, linear.shard(ranks), kind.layers)
                products.append(product)
                kernels += kind.layers
            others = each + _EXPERT_KERNELS * kind.has_experts
            beside += kind.layers * others
            kernels += kind.layers * (others + 1)
        if ranks > 1:
            kernels += 2 * shape.num_layers
        return cls(
            shape=shape,
            config=config,
            rates=rates,
            products=tuple(products),
            head=_head(shape, config, rates),
            elementwise=_elementwise(shape, ranks) / rates.bandwidth[16],
            latency=beside * rates.kernel_latency,
            kernels=kernels,
        )

    def layers_curve(self) -> Curve:
        """Seconds of the linear layers with all that comes with their rows, by rows."""
        return Curve.of(_ROWS, self.layers(np.array(_ROWS, dtype=np.float64)).tolist())

    def head_curve(self) -> Curve:
        """Seconds of the output head and of sampling, by sampled rows."""
        rows = np.array(_ROWS, dtype=np.float64)
        return Curve.of(_ROWS, self.product_seconds(self.head, rows).tolist())

    def layers(self, rows: Amount) -> Amount:
        """Seconds of the linear layers and the elementwise kernels; communication aside."""
        seconds: Amount = self.elementwise * rows + self.latency
        for product in self.products:
            seconds = seconds + product.layers * self.product_seconds(product, rows)
        return seconds

    def split_layers(self, rows: float) -> tuple[float, float, float]:
        """`layers` as seconds of reading weights, of arithmetic, and of latencies."""
        read = compute = 0.0
        latency = self.latency
        for product in self.products:
            reading, computing = self._roofline(product, rows)
            total = joined(reading, computing)
            share = reading_share(reading, computing)
            read += product.layers * total * share
            compute += product.layers * total * (1 - share)
            latency += product.layers * product.latency
        return read, compute + self.elementwise * rows, latency

    def split_head(self, rows: float) -> tuple[float, float, float]:
        """The output head's seconds, likewise."""
        if rows <= 0:
            return 0.0, 0.0, 0.0
        reading, computing = self._roofline(self.head, rows)
        total, share = joined(reading, computing), reading_share(reading, computing)
        return total * share, total * (1 - share), self.head.latency

    def decode_attention(self) -> tuple[float, float]:
        """Seconds of all layers whatever decodes see, and a token that they see."""
        shape, rates, ranks = self.shape, self.rates, self.config.tensor_parallel_size
        cache = self.config.kv_cache_dtype
        read = shape.layer_kv_bytes(cache, ranks) / rates.kv_bandwidth[_cache_bits(cache)]
        compute = shape.decode_token_flops(ranks) / rates.attention
        layers = shape.num_layers
        return layers * rates.attention_latency, layers * joined(read, compute)

    def prompt_attention(self) -> tuple[float, float, float, float]:
        """Seconds of all layers of a step's chunks: whatever they are, a pair of query and key, a
        cached token that they see, and a new token.

        A latent is projected up to keys and values for all that a chunk sees.
        """
        shape, rates, ranks = self.shape, self.rates, self.config.tensor_parallel_size
        layers = shape.num_layers
        cache = self.config.kv_cache_dtype
        read = shape.layer_kv_bytes(cache, ranks) / rates.kv_bandwidth[_cache_bits(cache)]
        features = 2 * shape.num_heads * shape.head_dim / ranks * shape.dtype_bytes
        passed = features + shape.layer_kv_bytes("auto", ranks)  # queries, outputs, keys, values
        if shape.latent is not None:
            latent = shape.latent
            heads = -(-shape.num_heads // ranks)
            up = 2.0 * latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
            read += up / rates.matmul["float"]
        return (
            layers * rates.attention_latency,
            layers * shape.pair_flops(ranks) / rates.attention,
            layers * read,
            layers * passed / rates.bandwidth[16],
        )

    def communication(self) -> tuple[float, float]:
        """Seconds of a step's sums over the ranks whatever its rows, and of a row.

        Two sums a layer (Shoeybi et al. 2019, "Megatron-LM", section 3) and one of embeddings, each
        of which moves 2 (n - 1) / n of its bytes through every rank's link (ring all-reduce).
        """
        ranks = self.config.tensor_parallel_size
        if ranks == 1:
            return 0.0, 0.0
        sums = 2 * self.shape.num_layers + 1
        moved = 2.0 * (ranks - 1) / ranks * self.shape.hidden_size * self.shape.dtype_bytes
        return sums * self.rates.all_reduce_latency, sums * moved / self.rates.link

    def _roofline(self, product: Product, rows: Amount) -> tuple[Amount, Amount]:
        """Seconds of reading and of arithmetic of one product."""
        experts = self.shape.experts
        if product.copies == 1 or experts is None:
            return product.weight_seconds + rows * product.row_traffic, rows * product.row_seconds
        met: Amount = rows * experts.top_k
        read: Amount = experts.touched(rows) * product.weight_seconds + met * product.row_traffic
        return read, met * product.row_seconds

    def product_seconds(self, product: Product, rows: Amount) -> Amount:
        """Seconds of one matrix product of `rows` tokens, of one of its layers."""
        seconds: Amount = joined(*self._roofline(product, rows)) + product.latency
        return seconds


def _product(
    shape: ModelShape, config: EngineConfig, rates: DeviceRates, linear: Linear, count: int
) -> Product:
    method = METHODS[config.quantization]
    stored = shape.stored if method.name == "none" else None
    bits = stored.bits if stored else method.weight_bits
    activation = _activation(shape, config)
    quantized = stored is not None or method.name != "none"
    bandwidth = rates.bandwidth[16 if bits > 8 else 8 if bits > 5 else 4]
    read = shape.linear_weight_bytes(linear, config.quantization) / bandwidth
    rate = rates.matmul.get(activation, rates.matmul["float"])
    compute = 2.0 * linear.rows * linear.columns / rate
    if quantized and (activation == "float" or activation not in rates.matmul):
        compute *= rates.widening
    if method.name == "llm_int8":
        compute *= _OUTLIER_COST
    if linear.copies > 1:
        inner = min(linear.rows, linear.columns)
        read /= rates.expert_reads
        compute *= (1 + _NARROW / inner) / rates.expert_compute
    traffic = (linear.rows + linear.columns) * shape.dtype_bytes / rates.bandwidth[16]
    return Product(count, linear.copies, read, compute, traffic, rates.kernel_latency)


def _activation(shape: ModelShape, config: EngineConfig) -> Activation:
    """What meets the weights of the linear layers."""
    if config.quantization == "none" and shape.stored is not None:
        return shape.stored.activation
    return METHODS[config.quantization].activation


def _head(shape: ModelShape, config: EngineConfig, rates: DeviceRates) -> Product:
    ranks = config.tensor_parallel_size
    rows = -(-shape.vocab_size // ranks)
    activation = "int8" if config.quantization != "none" else "float"
    rate = rates.matmul.get(activation, rates.matmul["float"])
    bandwidth = rates.bandwidth[16 if config.quantization == "none" else 8]
    return Product(
        layers=1,
        copies=1,
        weight_seconds=shape.head_bytes(config.quantization, ranks) / bandwidth,
        row_seconds=2.0 * rows * shape.hidden_size / rate,
        row_traffic=(rows * _LOGIT_BYTES) / rates.bandwidth[16],
        latency=2 * rates.kernel_latency,
    )


def _elementwise(shape: ModelShape, ranks: int) -> float:
    """Bytes of a token's passes through the kernels beside products and attention."""
    total = 0.0
    queries = shape.num_heads * shape.head_dim / ranks
    for kind in shape.layer_kinds():
        inner = float(shape.intermediate_size)
        if kind.has_experts and shape.experts is not None:
            experts = shape.experts
            inner = float(experts.top_k * experts.intermediate_size + experts.shared_size)
        elements = _HIDDEN_PASSES * shape.hidden_size
        each = elements + _QUERY_PASSES * queries + _GATE_PASSES * inner / ranks
        total += kind.layers * each
    return total * shape.dtype_bytes


def _cache_bits(kv_cache_dtype: str) -> int:
    return 16 if kv_cache_dtype == "auto" else 8
