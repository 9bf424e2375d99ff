"""The model that a server serves, as far as the protocol asks about it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoints.json_file import finite_number
from engine.config import EngineConfig
from engine.server.chat_template import ChatTemplate, load_chat_template
from engine.server.errors import ApiError
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.loading import LoadedModel

# Sampling that `generation_config.json` may name, and its bounds in `SamplingParams`.
_DEFAULTS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 100.0),
}
_WHOLE = ("top_k",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model's names and limits, and what turns requests into its tokens.

    Args:
        names: what requests may call it; the first stands in responses.
        root: the folder or file that it was loaded from.
        tokenizer: None if it has none: prompts must be token ids, and texts come back empty.
        chat_template: None if it has none: chats are refused.
        max_model_len: most tokens of prompt and output together.
        vocab_size: token ids are below it.
        default_sampling: fields of `SamplingParams` where a request leaves them out.
        created: Unix time, seconds.
    """

    names: tuple[str, ...]
    root: str
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    max_model_len: int
    vocab_size: int
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        names: Sequence[str] = (),
        chat_template: Path | None = None,
        generation_defaults: bool = True,
    ) -> ServedModel:
        """What a loaded model is to its clients.

        Args:
            loaded: the model.
            config: the knobs that it was loaded with.
            names: by default the folder's name, and the path as it was given.
            chat_template: a file with a Jinja template, instead of the model's own.
            generation_defaults: take sampling that a request leaves out from the model's
                `generation_config.json`, as vLLM does.

        Raises:
            ModelError: a chat template or `generation_config.json` is broken.
        """
        path = Path(config.model).expanduser()
        own = (path.resolve().name, config.model)
        template = None
        if config.tokenizer is not None:
            template = load_chat_template(Path(config.tokenizer), chat_template)
        if template is None:
            template = load_chat_template(path, chat_template)
        return cls(
            names=tuple(dict.fromkeys(names or own)),
            root=config.model,
            tokenizer=loaded.tokenizer,
            chat_template=template,
            max_model_len=loaded.runner.max_model_len,
            vocab_size=loaded.spec.vocab_size,
            default_sampling=generation_sampling(path) if generation_defaults else {},
        )

    @property
    def name(self) -> str:
        """What responses call it."""
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        """See to it that a request means this model; one that names none does.

        Raises:
            ApiError: 404, it names another.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here: ask for {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def needs_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: 400, the model has none.
        """
        if self.tokenizer is None:
            raise ApiError(
                400,
                "this model was loaded without a tokenizer: send prompts as token ids to "
                "/v1/completions",
                code="no_tokenizer",
            )
        return self.tokenizer


def generation_sampling(path: Path) -> dict[str, float]:
    """Sampling that a model folder's `generation_config.json` asks for; values out of bounds are
    left out.

    Raises:
        ModelError: the file is broken.
    """
    from engine.checkpoints.model_folder import open_model_folder

    stored = open_model_folder(path).generation_config
    found: dict[str, float] = {}
    for name, (low, high) in _DEFAULTS.items():
        number = finite_number(stored.get(name))
        if number is not None and low <= number <= high:
            found[name] = int(number) if name in _WHOLE else number
    return found
