"""The cost of a step by a data sheet: what it is made of, and what every such cost must obey."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from autotune.hardware.catalogue import load_catalogue
from autotune.planning.catalogue_cost import CatalogueCost
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.floors import first_token_floor, token_floor
from autotune.planning.methods_run import cache_dtypes_run, methods_run
from autotune.planning.step_parts import joined, reading_share
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_engine import VirtualEngine
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.step_record import StepRecord
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known

CATALOGUE = load_catalogue()
# The last of each generation.
ONE_OF_EACH = list({CATALOGUE.find(name).generation: name for name in CATALOGUE.names()}.values())
MODELS = {
    "llama": models.LLAMA_3_8B,
    "mixtral": models.MIXTRAL_8X7B,
    "qwen3 moe": models.QWEN3_30B_A3B,
    "deepseek": models.DEEPSEEK_V2_LITE,
    "gemma3": models.GEMMA_3_4B,
}


def cost_of(config: dict[str, Any], gpu: str = "h100-sxm", **knobs: Any) -> CatalogueCost:
    return CatalogueModel(known(config), CATALOGUE.find(gpu)).cost(EngineConfig(**knobs))


def decodes(sequences: int, seen: float) -> StepWork:
    return StepWork(sequences, 0, sequences, sequences, seen, 0, 0)


def works(seed: int, count: int) -> list[StepWork]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        chunks, decoding = int(draw.integers(0, 3)), int(draw.integers(0, 300))
        decoding = max(decoding, 1 - min(chunks, 1))
        tokens = int(draw.integers(chunks, 4000)) if chunks else 0
        seen = int(draw.integers(decoding, decoding * 8000 + 1)) if decoding else 0
        pairs = tokens * (tokens + 1) // 2
        found.append(
            StepWork(tokens + decoding, chunks, decoding, decoding + chunks, seen, tokens, pairs)
        )
    return found


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("graphs", [True, False])
def test_terms_sum_to_the_device_seconds(name: str, graphs: bool) -> None:
    cost = cost_of(MODELS[name], quantization="int4", cuda_graphs=graphs)
    for work in works(3, 40):
        terms = cost.terms(work)
        assert sum(terms.values()) == pytest.approx(cost.device_seconds(work), rel=1e-9)
        assert all(seconds >= 0 for seconds in terms.values())


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("sequences", [1, 7, 8, 9, 200, 600])
def test_a_decode_line_is_the_cost_of_decodes(sequences: int, graphs: bool) -> None:
    cost = cost_of(models.LLAMA_3_8B, cuda_graphs=graphs, max_num_seqs=1024)
    line = cost.decode_line(sequences)
    draw = np.random.default_rng(sequences)
    for seen in [0, 1, *draw.integers(1, 10**8, 40).tolist()]:
        work = decodes(sequences, seen)
        told = cost.device_seconds(work) + cost.host_seconds(work)
        assert line.at(seen) == pytest.approx(told, rel=1e-9)


def test_launches_bound_a_small_step_without_graphs() -> None:
    tiny = models.LLAMA_3_8B | {"hidden_size": 512, "intermediate_size": 1024}
    with_graphs, without = cost_of(tiny), cost_of(tiny, cuda_graphs=False)
    line = without.decode_line(4)
    assert len(line.tokens) == 3  # flat as long as the host is slower than the device
    assert line.at(0) == pytest.approx(line.at(line.tokens[1]))
    assert with_graphs.device_seconds(decodes(4, 400)) < without.device_seconds(decodes(4, 400))
    many = decodes(4, 10**8)
    assert with_graphs.device_seconds(many) == pytest.approx(without.device_seconds(many))


def test_a_graph_is_padded_to_the_next_size_of_the_ladder() -> None:
    cost = cost_of(models.LLAMA_3_8B)
    seconds = {count: cost.device_seconds(decodes(count, 5000)) for count in (8, 9, 12, 16, 17)}
    assert seconds[9] == pytest.approx(seconds[16], rel=1e-12)
    assert seconds[12] == pytest.approx(seconds[16], rel=1e-12)
    assert seconds[8] < seconds[9] < seconds[17]


@pytest.mark.parametrize("name", list(MODELS))
def test_more_work_takes_no_less_time(name: str) -> None:
    cost = cost_of(MODELS[name])
    for work in works(11, 40):
        base = cost.device_seconds(work)
        more = [work._replace(rows=work.rows + 64, sampled=work.sampled + 64)]
        if work.decode_sequences:
            more.append(work._replace(decode_kv_tokens=work.decode_kv_tokens + 1000))
        if work.prefill_sequences:
            more.append(work._replace(prefill_pairs=work.prefill_pairs + 10**6))
        assert all(cost.device_seconds(w) >= base for w in more)


def test_a_curve_is_close_to_what_it_tabulates() -> None:
    for name, config in MODELS.items():
        cost = cost_of(config)
        layers, head = cost.parts.layers_curve(), cost.parts.head_curve()
        for rows in (5, 13, 77, 300, 511, 2000, 7777, 16000):
            assert layers.at(rows) == pytest.approx(cost.parts.layers(rows), rel=0.015), name
            told = sum(cost.parts.split_head(rows))
            assert head.at(rows) == pytest.approx(told, rel=0.01), name


def test_ranks_divide_reading_and_add_communication() -> None:
    one, four = cost_of(models.LLAMA_3_70B), cost_of(models.LLAMA_3_70B, tensor_parallel_size=4)
    work = decodes(8, 80_000)
    alone, shared = one.terms(work), four.terms(work)
    assert shared["weights"] == pytest.approx(alone["weights"] / 4, rel=0.01)
    assert shared["kv_reads"] == pytest.approx(alone["kv_reads"] / 4, rel=0.01)
    assert alone["communication"] == 0
    assert shared["communication"] > 0
    # Over PCIe the same sums take longer.
    pcie = cost_of(models.LLAMA_3_70B, "h100-pcie", tensor_parallel_size=8)
    nvlink = cost_of(models.LLAMA_3_70B, "h100-sxm", tensor_parallel_size=8)
    assert pcie.terms(work)["communication"] > 2 * nvlink.terms(work)["communication"]


def test_four_bits_help_decodes_and_not_prompts() -> None:
    plain = cost_of(models.LLAMA_3_8B, "a100-80gb-sxm")
    narrow = cost_of(models.LLAMA_3_8B, "a100-80gb-sxm", quantization="int4")
    one, prompt = decodes(1, 100), StepWork.of_prompt(4000)
    assert narrow.device_seconds(one) < 0.6 * plain.device_seconds(one)
    assert narrow.device_seconds(prompt) > plain.device_seconds(prompt)


def test_fp8_helps_both_where_there_are_such_units() -> None:
    plain, narrow = cost_of(models.LLAMA_3_8B), cost_of(models.LLAMA_3_8B, quantization="fp8")
    for work in (decodes(1, 100), StepWork.of_prompt(4000)):
        assert narrow.device_seconds(work) < 0.75 * plain.device_seconds(work)


def test_a_step_reads_the_experts_that_its_tokens_meet() -> None:
    shape = known(models.QWEN3_30B_A3B)
    assert shape.experts is not None
    cost = cost_of(models.QWEN3_30B_A3B)
    plain = cost_of(models.QWEN3_30B_A3B | {"num_experts": 8})  # all of them met by any token
    one, many = decodes(1, 100), decodes(256, 25_600)
    assert cost.terms(one)["weights"] == pytest.approx(plain.terms(one)["weights"], rel=0.02)
    touched = shape.experts.touched(256) / 8
    experts_alone = cost.terms(many)["weights"] / plain.terms(many)["weights"]
    assert 0.5 * touched < experts_alone < touched


def test_windows_and_latents_read_less() -> None:
    latent = cost_of(models.DEEPSEEK_V2_LITE).decode_line(1)
    whole = cost_of(
        {k: v for k, v in models.DEEPSEEK_V2_LITE.items() if not k.endswith(("_rank", "_dim"))}
    ).decode_line(1)
    slope = latent.at(2_000_000) - latent.at(1_000_000)
    assert slope < 0.4 * (whole.at(2_000_000) - whole.at(1_000_000))


def test_draws_are_alike_for_a_seed_and_shared_by_configs() -> None:
    model = CatalogueModel(known(models.LLAMA_3_8B), CATALOGUE.find("h100-sxm"))
    again = CatalogueModel(known(models.LLAMA_3_8B), CATALOGUE.find("h100-sxm"))
    small, large = EngineConfig(), EngineConfig(max_num_seqs=512, tensor_parallel_size=2)
    work = decodes(64, 64_000)

    def seconds(m: CatalogueModel, config: EngineConfig, seed: int) -> list[float]:
        return [draw.cost.device_seconds(work) for draw in m.draws(config, 40, seed)]

    first = seconds(model, small, 7)
    assert seconds(again, small, 7) == first
    assert seconds(model, small, 8) != first
    assert np.corrcoef(first, seconds(model, large, 7))[0, 1] > 0.8
    middle = model.middle(small).cost.device_seconds(work)
    assert np.quantile(first, 0.2) < middle < np.quantile(first, 0.8)


@pytest.mark.parametrize("gpu", ONE_OF_EACH)
def test_no_draw_beats_the_physical_floor(gpu: str) -> None:
    sheet = CATALOGUE.find(gpu)
    for config in (models.LLAMA_3_8B, models.QWEN3_30B_A3B, models.DEEPSEEK_V2_LITE):
        model = CatalogueModel(known(config), sheet)
        for method, ranks in itertools.product(methods_run(sheet), (1, 2)):
            knobs = EngineConfig(
                quantization=method,
                tensor_parallel_size=ranks,
                kv_cache_dtype=cache_dtypes_run(sheet)[-1],
            )
            token = token_floor(model.shape, sheet, knobs, 4000).seconds
            prompt = first_token_floor(model.shape, sheet, knobs, 3000).seconds
            for draw in [model.middle(knobs), *model.draws(knobs, 10, 1)]:
                assert draw.cost.device_seconds(decodes(1, 4000)) > token
                assert draw.cost.device_seconds(StepWork.of_prompt(3000)) > prompt


def test_floors_of_a_known_model() -> None:
    shape, gpu = known(models.LLAMA_3_8B), CATALOGUE.find("h100-sxm")
    floor = token_floor(shape, gpu, EngineConfig())
    assert floor.seconds == pytest.approx(15.01e9 / 3.35e12, rel=1e-3)
    assert floor.set_by == "reading 15 GB of weights at 3.35 TB/s"
    halves = token_floor(shape, gpu, EngineConfig(tensor_parallel_size=2))
    assert halves.seconds == pytest.approx(floor.seconds / 2, rel=1e-3)
    assert halves.set_by.endswith("3.35 TB/s on each of 2 GPUs")
    long = token_floor(shape, gpu, EngineConfig(), 200_000)
    assert long.seconds - floor.seconds == pytest.approx(200_000 * 131072 / 3.35e12)
    assert "keys and values" in long.set_by
    prompt = first_token_floor(shape, gpu, EngineConfig(), 8000)
    operations = 2 * shape.matmul_parameters * 8000 + 2 * 32 * 32 * 128 * 8000**2
    assert prompt.seconds == pytest.approx(operations / 989.4e12, rel=1e-2)
    assert "operations of a prompt of 8000 tokens" in prompt.set_by


def test_a_run_at_once_is_the_run_step_by_step() -> None:
    model = CatalogueModel(known(models.LLAMA_3_8B), CATALOGUE.find("l4"))
    config = EngineConfig(max_model_len=2048, quantization="int8", max_num_seqs=16)
    cache, draw = model.cache(config), model.draws(config, 1, 3)[0]
    assert cache is not None

    def play(steps: list[StepRecord] | None) -> list[tuple[float, ...]]:
        on_step = None if steps is None else steps.append
        engine = VirtualEngine(config, draw.cost, cache, times=draw.times, on_step=on_step)
        for index in range(30):
            due = 0.3 * index
            engine.run(due)
            engine.send(LoadRequest(str(index), due, (index,) * 200, 20 + 7 * index), due)
        engine.run()
        return [record.token_times for record in engine.take_records()]

    for quick, slow in zip(play(None), play([]), strict=True):
        assert quick == pytest.approx(slow, rel=1e-9)


def test_rooflines_join_smoothly() -> None:
    assert joined(2.0, 0.0) == 2.0
    assert joined(0.0, 3.0) == 3.0
    assert 3.0 < joined(3.0, 2.0) < 5.0
    assert reading_share(1.0, 1.0) == pytest.approx(0.5)
    # The share is the elasticity of the joined time.
    step, read, compute = 1e-6, 1.3, 0.8
    slope = (joined(read * (1 + step), compute) / joined(read, compute) - 1) / step
    assert reading_share(read, compute) == pytest.approx(slope, rel=1e-4)
