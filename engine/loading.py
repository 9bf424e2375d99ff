"""From an `EngineConfig` to an engine that is ready to serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.checkpoints.model_folder import ModelFolder, open_model_folder
from engine.checkpoints.open_source import open_source
from engine.checkpoints.source import TensorSource
from engine.config import EngineConfig
from engine.detokenizer import StreamDetokenizer
from engine.engine import CacheShape, Engine
from engine.errors import ConfigError, EngineError, EnvironmentLacks
from engine.freed_memory import return_freed_memory
from engine.kernel_tuning import tuning_notes
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.models.serving_notes import serving_notes
from engine.models.sharding import check_divides
from engine.models.spec import DecoderSpec
from engine.parallel import ALONE, Ranks, can_connect
from engine.parallel_driver import DriverRanks
from engine.quantize.method_table import METHODS
from engine.quantize.prepared import prepared_folder
from engine.quantize.write_checkpoint import OnLayer
from engine.runner import ModelRunner
from engine.step_record import StepRecord
from engine.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class LoadedModel:
    """A model on its device with its KV cache, and what else its folder told.

    `tokenizer` is None if the folder has none: prompts must then be token ids. `notes` are
    sentences on what of the checkpoint is served otherwise than it is stored. A model that is
    divided among processes has them ended by `close`.
    """

    runner: ModelRunner
    spec: DecoderSpec
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def failure(self) -> EngineError | None:
        """Why no step can be computed any more, if so: the model must be loaded again."""
        return self.runner.decoder.ranks.failure

    def close(self) -> None:
        """End the processes of the other ranks, if there are any."""
        self.runner.forward.release_graphs()  # they hold on to NCCL's group
        self.runner.decoder.ranks.close()

    def engine(
        self, config: EngineConfig, on_step: Callable[[StepRecord], None] | None = None
    ) -> Engine:
        """An engine on this model; `config` is the one that the model was loaded with."""
        runner = self.runner

        def rebuild_cache(changed: EngineConfig) -> CacheShape:
            runner.reconfigure(changed, resolve_max_model_len(changed, self.spec))
            return CacheShape(runner.num_blocks, runner.max_model_len, runner.groups)

        return Engine(
            config,
            runner,
            CacheShape(runner.num_blocks, runner.max_model_len, runner.groups),
            eos_token_ids=frozenset(self.eos_token_ids),
            vocab_size=self.spec.vocab_size,
            detokenizer=None if self.tokenizer is None else StreamDetokenizer(self.tokenizer),
            rebuild_cache=rebuild_cache,
            apply_live=runner.apply_live,
            outgrown_by=runner.outgrown_by,
            on_step=on_step,
        )


def resolve_device(config: EngineConfig) -> torch.device:
    """The device that a config asks for.

    Raises:
        EnvironmentLacks: a GPU is asked for and there is none.
    """
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise EnvironmentLacks(
            "device=cuda was asked for, but PyTorch sees no CUDA device: set device=cpu, or "
            "install a driver and a CUDA build of PyTorch"
        )
    return torch.device("cuda" if config.device != "cpu" and present else "cpu")


def resolve_dtype(config: EngineConfig, spec: DecoderSpec) -> torch.dtype:
    """The dtype of weights and activations: as asked, or the checkpoint's."""
    return DTYPES[spec.checkpoint_dtype if config.dtype == "auto" else config.dtype]


def resolve_max_model_len(config: EngineConfig, spec: DecoderSpec) -> int:
    """The longest sequence in tokens: as asked, or the model's limit.

    Raises:
        ConfigError: longer than the model's limit, or than a step where prompts are not split.
    """
    if config.max_model_len is None:
        return spec.max_position
    if config.max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's limit of "
            f"{spec.max_position} tokens"
        )
    return config.max_model_len


def load_model(config: EngineConfig, on_layer: OnLayer | None = None) -> LoadedModel:
    """Load weights and tokenizer, allocate the KV cache, and warm up.

    Where `quantization` needs calibration, the model is quantized first unless the cache has it;
    `on_layer` is then told of the layers done and of all there are.

    Raises:
        ModelError: the folder is missing, broken or of an unsupported architecture.
        ConfigError: a knob contradicts the model.
        EnvironmentLacks: no such device, or not enough memory.
    """
    folder = open_model_folder(config.model)
    spec = decoder_spec(folder)
    max_model_len = resolve_max_model_len(config, spec)
    device = resolve_device(config)
    check_ranks(config, spec, device)
    eos_token_ids = folder.eos_token_ids()
    tokenizer = _tokenizer(config, folder)
    weights = folder.path
    if METHODS[config.quantization].calibrated:
        weights = prepared_folder(config, folder, device, on_layer)
    ranks = _start_ranks(config, weights, device)
    try:
        source = open_source(folder if weights == folder.path else open_model_folder(weights))
        decoder = _load_part(config, folder, spec, source, device, ranks)
        if isinstance(ranks, DriverRanks):
            ranks.meet()
            ranks.tell("run", config=config.to_dict(), max_model_len=max_model_len)
        runner = ModelRunner(decoder, config, max_model_len, eos_token_ids)
        runner.warmup()
        runner.begin_speculation()
    except BaseException:
        ranks.close()
        raise
    return_freed_memory()
    notes = [*serving_notes(spec, max_model_len), *source.notes, *decoder.notes]
    notes += [*runner.notes, *tuning_notes(config.model, device)]
    return LoadedModel(runner, spec, tokenizer, eos_token_ids, notes)


def load_part(config: EngineConfig, weights: Path, device: torch.device, ranks: Ranks) -> Decoder:
    """The part of a model that one of its ranks has; the driver has checked all the rest.

    `weights`: the folder with the weights, which is not `config.model` where they were prepared.

    Raises:
        ModelError: the folder is missing or broken.
        EnvironmentLacks: not enough memory.
    """
    folder = open_model_folder(config.model)
    source = open_source(folder if weights == folder.path else open_model_folder(weights))
    return _load_part(config, folder, decoder_spec(folder), source, device, ranks)


def check_ranks(config: EngineConfig, spec: DecoderSpec, device: torch.device) -> None:
    """Refuse more ranks than there are devices, or that cannot divide the model.

    Raises:
        ConfigError: `tensor_parallel_size` does not divide heads or features.
        EnvironmentLacks: fewer GPUs, or a PyTorch that cannot connect them.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return
    check_divides(spec, size)
    here = torch.cuda.device_count() if device.type == "cuda" else size
    if here < size:
        raise EnvironmentLacks(
            f"tensor_parallel_size={size} needs {size} GPUs, {here} {'is' if here == 1 else 'are'} "
            "here"
        )
    backend = "NCCL" if device.type == "cuda" else "gloo"
    if not can_connect(device):
        raise EnvironmentLacks(
            f"tensor_parallel_size={size} needs {backend}, which this build of PyTorch lacks"
        )


def _start_ranks(config: EngineConfig, weights: Path, device: torch.device) -> Ranks:
    size = config.tensor_parallel_size
    if size == 1:
        return ALONE
    try:
        ranks = DriverRanks(size, device)
        ranks.start(config=config.to_dict(), weights=str(weights), device=device.type)
    except OSError as error:
        raise EnvironmentLacks(
            f"the processes of tensor_parallel_size={size} cannot be started: {error}"
        ) from error
    return ranks


def _load_part(
    config: EngineConfig,
    folder: ModelFolder,
    spec: DecoderSpec,
    source: TensorSource,
    device: torch.device,
    ranks: Ranks,
) -> Decoder:
    # Layers that a calibrated method has prepared are as they should be.
    method = "none" if METHODS[config.quantization].calibrated else config.quantization
    dtype = resolve_dtype(config, spec)
    try:
        return load_decoder(source, spec, dtype, device, method, config.quantization, ranks)
    except torch.OutOfMemoryError as error:
        more = "" if device.type == "cpu" else ", raise tensor_parallel_size"
        raise EnvironmentLacks(
            f"the weights of {folder.path} do not fit the memory of {device}: set quantization to "
            f"int8 or int4{more}, or choose a smaller model"
        ) from error


def _tokenizer(config: EngineConfig, folder: ModelFolder) -> Tokenizer | None:
    """The tokenizer that was named, or the folder's own if it has one.

    One that is there and broken is an error; one that is not is told when a text comes.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if not has_tokenizer(folder.path):
        return None
    return load_tokenizer(folder.path)
