"""From an `EngineConfig` to an engine that is ready to serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.checkpoints.model_folder import ModelFolder, open_model_folder
from engine.checkpoints.open_source import open_source
from engine.config import EngineConfig
from engine.detokenizer import StreamDetokenizer
from engine.engine import CacheShape, Engine
from engine.errors import ConfigError, EnvironmentLacks
from engine.freed_memory import return_freed_memory
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.models.serving_notes import serving_notes
from engine.models.spec import DecoderSpec
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
    sentences on what of the checkpoint is served otherwise than it is stored.
    """

    runner: ModelRunner
    spec: DecoderSpec
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    notes: list[str] = field(default_factory=list)

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
    eos_token_ids = folder.eos_token_ids()
    tokenizer = _tokenizer(config, folder)
    source, method = open_source(folder), config.quantization
    if METHODS[method].calibrated:
        prepared = prepared_folder(config, folder, device, on_layer)
        source = open_source(open_model_folder(prepared))
        method = "none"  # the layers are as they should be
    dtype = resolve_dtype(config, spec)
    try:
        decoder = load_decoder(source, spec, dtype, device, method, config.quantization)
    except torch.OutOfMemoryError as error:
        raise EnvironmentLacks(
            f"the weights of {folder.path} do not fit the memory of {device}: set quantization to "
            "int8 or int4, or choose a smaller model"
        ) from error
    runner = ModelRunner(decoder, config, max_model_len, eos_token_ids)
    runner.warmup()
    return_freed_memory()
    notes = [*serving_notes(spec, max_model_len), *source.notes]
    return LoadedModel(runner, spec, tokenizer, eos_token_ids, notes)


def _tokenizer(config: EngineConfig, folder: ModelFolder) -> Tokenizer | None:
    """The tokenizer that was named, or the folder's own if it has one.

    One that is there and broken is an error; one that is not is told when a text comes.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if not has_tokenizer(folder.path):
        return None
    return load_tokenizer(folder.path)
