"""Folders of Medusa heads, as they are published and as training writes them.

Three layouts of safetensors are read; `h` counts heads and `l` residual blocks, L of them:

- FasterDecoding's, also written here: `medusa_lm_head.safetensors` with `{h}.{l}.linear.weight`,
  `{h}.{l}.linear.bias` and the head's output `{h}.{L}.weight`; beside it a `config.json` with
  `medusa_num_heads` and `medusa_num_layers`. Text Generation Inference's second version leaves the
  outputs out: they are the model's own. (Uploaded configs name fewer heads than the file has: all
  in the file count.)
- The same under `medusa_head.` in the shards of a checkpoint that holds model and heads.
- vLLM's: `model.safetensors` with `blocks.{h}.layers.{l}.weight` and `lm_heads.{h}.weight`, and
  `token_map` where the outputs have fewer rows than the vocabulary. With `original_lm_head` all
  heads share one output, which is in the file or is the model's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.json_file import finite_number, read_json_object
from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.checkpoints.safetensors_files import (
    FLOAT_DTYPES,
    PICKLES,
    SINGLE_FILE,
    SafetensorsFiles,
)
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks, ModelError
from engine.models.decoder import Decoder
from engine.models.load_decoder import LayerReader
from engine.models.registry import decoder_spec
from engine.models.spec import DecoderSpec
from engine.speculate.medusa_heads import HeadWeights, MedusaHeads, MedusaWeights, ResidualLayer
from engine.speculate.medusa_tree import MOST_RANKS
from kernels.ops import LinearWeight

HEADS_FILE = "medusa_lm_head.safetensors"
CALIBRATION = "medusa_calibration"
_PICKLE = "medusa_lm_head.pt"
_PREFIX = r"(?:medusa_heads?\.|medusa\.|heads\.)?"
_LAYER = re.compile(_PREFIX + r"(\d+)\.(\d+)\.linear\.weight")
_OUTPUT = re.compile(_PREFIX + r"(\d+)\.(\d+)\.weight")
_VLLM_LAYER = re.compile(_PREFIX + r"blocks\.(\d+)\.layers\.(\d+)\.weight")
_VLLM_OUTPUT = re.compile(_PREFIX + r"lm_heads\.(\d+)\.weight")
_VLLM_SHARED = re.compile(_PREFIX + r"lm_head\.weight")
_TOKEN_MAP = re.compile(_PREFIX + r"token_map")


def read_medusa(path: str | Path, spec: DecoderSpec, model: str) -> MedusaWeights:
    """The heads in a folder, checked to fit a model of `spec`; `model` is its name in messages.

    Raises:
        ModelError: no folder or no heads in it, only a pickle, a file that is broken or contradicts
            its config.json, or heads for another hidden size or vocabulary.
    """
    folder = Path(path).expanduser()
    config = _config(folder)
    files = _open(folder)
    names = _Names.of(files)
    if not names.layers and not names.outputs:
        raise ModelError(
            f"{folder} holds no Medusa heads: tensors named 0.0.linear.weight (FasterDecoding, "
            "TGI) or blocks.0.layers.0.weight (vLLM) are wanted"
        )
    reader = _Reader(folder, files, names, config, spec, model)
    weights = reader.weights()
    files.release()
    return weights


def load_medusa(config: EngineConfig, decoder: Decoder) -> MedusaHeads:
    """The heads in `config.speculative_model`, laid out beside the model that they draft for.

    Of a model that is divided, the rank that drafts has all of the heads. They are rounded to int8
    where the model is quantized: what it generates does not depend on them.

    Raises:
        ModelError: as `read_medusa`.
        EnvironmentLacks: they do not fit the memory.
    """
    assert config.speculative_model is not None
    weights = read_medusa(config.speculative_model, decoder.spec, config.model)
    shared: LinearWeight | None = None
    try:
        if weights.heads[0].output is None:
            shared = _whole_output(config, decoder)
        return MedusaHeads(
            weights,
            decoder.dtype,
            decoder.device,
            shared,
            "none" if config.quantization == "none" else "int8",
            decoder.spec.logit_soft_cap,
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentLacks(
            f"the Medusa heads in {config.speculative_model} do not fit the memory of "
            f"{decoder.device} beside the model: choose another speculative_method, or quantize "
            "the model"
        ) from error


def _whole_output(config: EngineConfig, decoder: Decoder) -> LinearWeight:
    """The model's output head with all rows, which a rank of several does not have."""
    if decoder.ranks.size == 1:
        return decoder.head
    folder = open_model_folder(config.model)
    reader = LayerReader(open_source(folder), decoder_spec(folder), decoder.dtype, decoder.device)
    output = reader.embedding_and_head()[1]
    reader.source.release()
    return output


@dataclass(frozen=True, slots=True)
class _Names:
    """What a checkpoint calls the parts of heads, by head and depth; None where it has none."""

    layers: dict[tuple[int, int], str]
    outputs: dict[int, str]
    shared: str | None
    token_map: str | None

    @classmethod
    def of(cls, files: SafetensorsFiles) -> _Names:
        layers, plain, outputs = {}, {}, {}
        shared = token_map = None
        for name in files.names():
            if found := _LAYER.fullmatch(name) or _VLLM_LAYER.fullmatch(name):
                layers[int(found[1]), int(found[2])] = name
            elif found := _OUTPUT.fullmatch(name):
                plain[int(found[1]), int(found[2])] = name
            elif found := _VLLM_OUTPUT.fullmatch(name):
                outputs[int(found[1])] = name
            elif _VLLM_SHARED.fullmatch(name):
                shared = name
            elif _TOKEN_MAP.fullmatch(name):
                token_map = name
        outputs.update({head: name for (head, _), name in sorted(plain.items())})
        # The shared output of vLLM's layout only: elsewhere `lm_head` is the model's own.
        vllm = any(".layers." in name for name in layers.values())
        return cls(layers, outputs, shared if vllm else None, token_map)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the tensors that were found and checks each against the model."""

    folder: Path
    files: SafetensorsFiles
    names: _Names
    config: dict[str, Any]
    spec: DecoderSpec
    model: str

    def weights(self) -> MedusaWeights:
        num_heads, num_layers = self._counts()
        self._check_sizes()
        token_map = self._token_map()
        outputs = self._outputs(num_heads, token_map)
        heads = []
        for head in range(num_heads):
            layers = [self._layer(head, depth) for depth in range(num_layers)]
            heads.append(HeadWeights(tuple(layers), outputs[head]))
        return MedusaWeights(tuple(heads), token_map, self._calibration(num_heads))

    def _counts(self) -> tuple[int, int]:
        """Heads and layers of each, by the tensors; the config must not ask for more."""
        names = self.names
        found = {head for head, _ in names.layers} | set(names.outputs)
        num_heads = len(found)
        num_layers = len({depth for _, depth in names.layers})
        grid = {(head, depth) for head in range(num_heads) for depth in range(num_layers)}
        missing = sorted(grid - set(names.layers))
        if found != set(range(num_heads)) or missing or len(grid) != len(names.layers):
            where = f"layer {missing[0][1]} of head {missing[0][0]}" if missing else "a head"
            raise ModelError(
                f"{self.folder}: the Medusa heads are not complete: {where} is missing"
            )
        vllm = self.config.get("model_type") == "medusa" and "num_heads" in self.config
        for keys, has, what in (
            (("medusa_num_heads", "num_heads"), num_heads, "heads"),
            (("medusa_num_layers", "num_hidden_layers"), num_layers, "layers in each head"),
        ):
            key = keys[1 if vllm else 0]
            said = self.config.get(key)
            if said is None:
                continue
            wrong = said > has if what == "heads" and type(said) is int else said != has
            if type(said) is not int or wrong:
                raise ModelError(
                    f"{self.folder / 'config.json'} says {key}={said!r}, but the tensors are of "
                    f"{has} {what}"
                )
        return num_heads, num_layers

    def _check_sizes(self) -> None:
        for key, own, what in (
            ("hidden_size", self.spec.hidden_size, "a hidden size"),
            ("vocab_size", self.spec.vocab_size, "a vocabulary"),
        ):
            # In a checkpoint of model and heads these are the model's, and as telling.
            said = self.config.get(key)
            if said is not None and said != own:
                raise self._misfit(f"{what} of {said!r}", own)

    def _misfit(self, theirs: str, own: int) -> ModelError:
        return ModelError(
            f"the Medusa heads in {self.folder} are for {theirs}, {self.model} has {own}: give "
            "heads that were trained for this model (autotune train-medusa makes them)"
        )

    def _layer(self, head: int, depth: int) -> ResidualLayer:
        name = self.names.layers[head, depth]
        hidden = self.spec.hidden_size
        weight = self._float(name, 2)
        if weight.shape != (hidden, hidden):
            raise self._misfit(f"a hidden size of {weight.shape[-1]} ({name!r})", hidden)
        bias_name = name.removesuffix("weight") + "bias"
        if bias_name not in self.files:
            return ResidualLayer(weight)
        bias = self._float(bias_name, 1)
        if len(bias) != hidden:
            raise self._misfit(f"a hidden size of {len(bias)} ({bias_name!r})", hidden)
        return ResidualLayer(weight, bias)

    def _outputs(self, num_heads: int, token_map: Tensor | None) -> list[Tensor | None]:
        """Each head's own output; None for that of the model."""
        names = self.names.outputs
        if not names and self.names.shared is None:
            if token_map is not None:
                raise ModelError(
                    f"{self.folder}: token_map is there, but no output of the heads that has its "
                    f"{len(token_map)} rows"
                )
            return [None] * num_heads
        if self.config.get("original_lm_head") and self.names.shared is None:
            # One of them stands for all.
            names = dict.fromkeys(range(num_heads), names[min(names)])
        if self.names.shared is not None:
            names = dict.fromkeys(range(num_heads), self.names.shared)
        if missing := sorted(set(range(num_heads)) - set(names)):
            raise ModelError(
                f"{self.folder}: the Medusa heads are not complete: the output of head "
                f"{missing[0]} is missing"
            )
        read = {name: self._output(name, token_map) for name in set(names.values())}
        return [read[names[head]] for head in range(num_heads)]

    def _output(self, name: str, token_map: Tensor | None) -> Tensor:
        weight = self._float(name, 2)
        hidden, vocabulary = self.spec.hidden_size, self.spec.vocab_size
        if weight.shape[1] != hidden:
            raise self._misfit(f"a hidden size of {weight.shape[-1]} ({name!r})", hidden)
        if token_map is not None and len(weight) == vocabulary:
            return weight[token_map]
        rows = vocabulary if token_map is None else len(token_map)
        if len(weight) != rows:
            raise self._misfit(f"a vocabulary of {len(weight)} ({name!r})", rows)
        return weight

    def _token_map(self) -> Tensor | None:
        name = self.names.token_map
        if name is None:
            return None
        token_map = self.files.raw(name, (torch.int64, torch.int32)).long().clone()
        size = self.spec.vocab_size
        bounds = token_map.dim() == 1 and len(token_map) > 0
        if not bounds or int(token_map.min()) < 0 or int(token_map.max()) >= size:
            raise self.files.problem(name, f"must list tokens below the vocabulary of {size}")
        if len(set(token_map.tolist())) < len(token_map):
            raise self.files.problem(name, "lists a token twice")
        return token_map

    def _calibration(self, num_heads: int) -> tuple[tuple[float, ...], ...]:
        rows = self.config.get(CALIBRATION)
        if rows is None:
            return ()
        table = [_factors(row) for row in rows] if isinstance(rows, list) else []
        if len(table) != num_heads or not all(table):
            raise ModelError(
                f"{self.folder / 'config.json'}: {CALIBRATION} must be a list of factors of at "
                f"least 0 for each of {num_heads} heads"
            )
        return tuple(table)

    def _float(self, name: str, num_dimensions: int) -> Tensor:
        """A tensor in memory of its own."""
        tensor = self.files.raw(name, FLOAT_DTYPES).clone()
        if tensor.dim() != num_dimensions:
            raise self.files.problem(
                name, f"has {tensor.dim()} dimensions, {num_dimensions} are wanted"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise self.files.problem(name, "holds NaN or infinity")
        return tensor


def _factors(row: object) -> tuple[float, ...]:
    """The numbers of a list; none if it is no list, or has something else in it."""
    if not isinstance(row, list):
        return ()
    numbers = [finite_number(value) for value in row[:MOST_RANKS]]
    known = tuple(number for number in numbers if number is not None and number >= 0)
    return known if len(known) == len(numbers) else ()


def _config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ModelError(
            f"folder of Medusa heads {folder} does not exist: give a folder with {HEADS_FILE}"
        )
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is a file: give the folder that holds it beside its config.json"
        )
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}


def _open(folder: Path) -> SafetensorsFiles:
    named = folder / HEADS_FILE
    if named.is_file():
        return SafetensorsFiles.of_file(named)
    if (folder / _PICKLE).is_file():
        raise ModelError(
            f"{folder} holds its Medusa heads as a pickle ({_PICKLE}), which can run any code when "
            f"it is opened and is refused: convert it once to {HEADS_FILE}, with "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", *PICKLES)):
        raise ModelError(
            f"{folder} holds no Medusa heads: neither {HEADS_FILE} nor {SINGLE_FILE} is there"
        )
    return SafetensorsFiles.open(folder)
