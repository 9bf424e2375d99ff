"""The engine that a platform runs: its image, its command line, its file, what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.deploy.engine_launch import flag_words, launch_words
from autotune.deploy.engine_yaml import render_engine_yaml
from autotune.deploy.evidence import Evidence
from autotune.deploy.measured_engine import MeasuredEngine
from autotune.deploy.platforms.names import is_path, last_part, slug
from autotune.deploy.replica_capacity import ReplicaCapacity, replica_capacity
from autotune.deploy.serving_engine import ServingEngine, load_serving_engine
from autotune.deploy.serving_yaml import render_serving_yaml
from autotune.deploy.target import BUNDLED, Deployment
from autotune.deploy.translate import translate
from autotune.deploy.translation import LeftOut, Translation
from autotune.deploy.translation_notes import key_notes
from autotune.deploy.yaml_text import comment, setting
from autotune.errors import BadInput

PORT = 8000
FILE_PATH = "FILE"
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - inside a container, where only its own ports are published
# Knobs that name files of the machine; where containers run, these lie elsewhere.
_FILES = ("model", "tokenizer", "speculative_model", "calibration")


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting of the engine, the words of a command line for it, and its comments."""

    key: str
    value: Any
    words: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Carried:
    """One engine as a platform runs it.

    Arguments:
        engine: `vllm`, `sglang` or `engine`.
        title: the engine's name and release in words.
        image: its container image, with a release as tag.
        device: `cpu` or `cuda`, where it was measured.
        gpus: devices that one replica needs; 0 on a CPU.
        cores: cores that one replica was measured with; None if they are not known.
        stored_bytes: size of the model's files; 0 if they are not here.
        memory_bytes: what weights and KV cache take, as far as it is known.
        model: what the engine loads, by a path or a hub's name.
        name: the name under which it serves the model.
        slug: the same, as platforms accept names.
        folders: folders and files of this machine that it loads, and where it looks for them.
        file: the name of its configuration file.
        text: that file's content.
        words: the command that starts it with that file, at the path FILE_PATH.
        environment: variables that it is to be started with, each with its comments.
        flags: the same settings one by one, without the model.
        capacity: what one replica bore.
        lost: knobs that do not carry over.
        warnings: what a person should know.
    """

    engine: str
    title: str
    image: str
    device: str
    gpus: int
    cores: int | None
    stored_bytes: int
    memory_bytes: int | None
    model: str
    name: str
    slug: str
    folders: Mapping[str, str]
    file: str
    text: str
    words: tuple[str, ...]
    environment: Mapping[str, tuple[str, tuple[str, ...]]]
    flags: tuple[Flag, ...]
    capacity: ReplicaCapacity | None
    lost: tuple[LeftOut, ...]
    warnings: tuple[str, ...]

    @property
    def from_hub(self) -> bool:
        """Whether the model comes from the Hugging Face hub, so that a token may be needed."""
        return not is_path(self.model)

    @property
    def key_variable(self) -> str | None:
        """The environment variable of which the server takes the API key that it asks for."""
        return {"vllm": "VLLM_API_KEY", BUNDLED: "AUTOTUNE_API_KEY"}.get(self.engine)

    def command(self, config: str) -> list[str]:
        """The words that start it with its file at the path `config`, open to the network."""
        words = [config if word == FILE_PATH else word for word in self.words]
        return [*words, "--served-model-name", self.name]

    def arguments(self) -> list[str]:
        """Every flag as words of a command line."""
        return [word for flag in self.flags for word in flag.words]

    def in_flight_query(self, by: str = "") -> str:
        """Prometheus' query for the requests that are inside, running or waiting.

        Arguments:
            by: more conditions on the labels, each with a comma before it.
        """
        where = f'{{model_name="{self.name}"{by}}}'
        running, waiting = self.in_flight_metrics()
        return f"sum({running}{where} + {waiting}{where})"

    def in_flight_metrics(self) -> tuple[str, str]:
        """The names of the gauges of running and of waiting requests at `/metrics`."""
        if self.engine == "sglang":
            return "sglang:num_running_reqs", "sglang:num_queue_reqs"
        return "vllm:num_requests_running", "vllm:num_requests_waiting"


def carry(
    deployment: Deployment,
    carries: tuple[str, ...],
    *,
    images: Mapping[str, str] | None = None,
    contained: bool = True,
    folder: str | None = None,
) -> Carried:
    """The engine that a platform is to run.

    Arguments:
        deployment: what is deployed.
        carries: the engines that the platform can run, its default first.
        images: the platform's own images by engine, if it has them.
        contained: whether it runs in a container at all; without, there is no image.
        folder: where containers find the files of this machine; None where they stay.

    Raises:
        BadInput: the engine has no image for the device, the bundled one was asked to load from
            the hub, which it does not, or the run tuned another engine itself.
    """
    measured = MeasuredEngine.of(deployment.run)
    engine = deployment.engine or (carries[0] if measured is None else measured.name)
    if measured is not None and (engine != measured.name or engine not in carries):
        raise BadInput(
            f"this was measured on {measured.table.title} itself, whose flags go to no other "
            f"engine; the platform can run {', '.join(carries)}"
        )
    config, evidence = deployment.config, deployment.evidence
    if not (deployment.model or config.model):
        raise BadInput("the run does not say which model the server loaded; give --model")
    folders: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for knob in _FILES:
        path = getattr(config, knob)
        if knob == "model" and deployment.model is not None:
            changes[knob] = deployment.model
        elif path is not None and folder is not None and is_path(path):
            here = Path(path).expanduser().absolute()
            whole = _whole(here)
            folders[str(whole)] = _place(str(whole), folder, folders)
            changes[knob] = str(Path(folders[str(whole)], here.relative_to(whole)))
    placed = config.replace(**changes)
    if engine == BUNDLED and not is_path(placed.model):
        raise BadInput(
            f"--engine {BUNDLED}: the bundled engine loads a folder, not {placed.model!r} of the "
            "hub; give --model a path that is valid where it runs"
        )
    name = _served_name(deployment, measured, placed.model)
    capacity = replica_capacity(evidence)
    warnings: list[str] = []
    environment: dict[str, tuple[str, tuple[str, ...]]] = {}
    flags: tuple[Flag, ...] = ()
    lost: tuple[LeftOut, ...] = ()
    if engine == BUNDLED:
        version = str((deployment.run.get("versions") or {}).get("autotune") or "latest")
        title, own_image = f"autotune's bundled engine {version}", f"autotune:{version}"
        file, text = "engine.yaml", render_engine_yaml(placed, evidence)
        ends = ("--host", _EVERYWHERE, "--port", str(PORT))
        words: tuple[str, ...] = ("autotune", "serve", FILE_PATH, *ends)
    else:
        table = load_serving_engine(engine)
        version = (measured.version if measured else "") or table.version
        title, file = f"{table.title} {version}", f"{engine}.yaml"
        own_image = _image(table, evidence.device) if contained and images is None else ""
        own_image = own_image.replace(table.version, version)
        if measured is None:
            translation = translate(placed, table, evidence.device, deployment.measured)
            warnings.append(
                f"this was measured with autotune's bundled engine, not with {table.title}: "
                "measure there (benchmark.sh) before relying on a gain or on the capacity of a "
                "replica"
            )
            text = render_serving_yaml(table, placed, evidence, deployment.measured)
        else:
            translation = measured.translation(placed.model)
            warnings += measured.warnings()
            text = _own_file(title, translation, evidence)
        words = tuple(launch_words(table, translation, host=_EVERYWHERE, port=PORT, file=FILE_PATH))
        flags, lost = _flags(table, translation, evidence), translation.lost
        environment = _environment(translation, evidence)
    if capacity is None:
        warnings.append("no load was measured, so nothing says how much one replica bears")
    elif not capacity.met:
        warnings.append(
            f"{capacity.basis}: a replica that is scaled by it is not promised to keep the SLO"
        )
    gpus = config.tensor_parallel_size if evidence.device == "cuda" else 0
    hardware = deployment.run.get("hardware") or {}
    return Carried(
        engine=engine,
        title=title,
        image=own_image if images is None else images[engine],
        device=evidence.device,
        gpus=gpus,
        cores=config.num_threads or hardware.get("cores"),
        stored_bytes=sum(_size(Path(here)) for here in folders),
        memory_bytes=_memory(deployment),
        model=placed.model,
        name=name,
        slug=slug(name),
        folders=folders,
        file=file,
        text=text,
        words=words,
        environment=environment,
        flags=flags,
        capacity=capacity,
        lost=lost,
        warnings=tuple(warnings),
    )


def _served_name(deployment: Deployment, measured: MeasuredEngine | None, model: str) -> str:
    """The name that clients use: as it was measured, or as the model is called."""
    if deployment.model is None and measured is not None and measured.served_name:
        return measured.served_name
    known = deployment.model or deployment.config.model
    if is_path(known) and deployment.model is None:
        known = (deployment.run.get("model") or {}).get("name") or model
    return last_part(known) if is_path(known) else str(known)


def _own_file(title: str, translation: Translation, evidence: Evidence) -> str:
    """The config file of an engine that was itself measured."""
    notes = key_notes(translation, evidence)
    lines = comment(f"Configuration of {title}, measured on it.")
    for line in evidence.summary:
        lines += comment(line, indent="  ")
    lines.append("")
    for key, value in translation.flags().items():
        lines += [line for note in notes.get(key, ()) for line in comment(note, indent="  ")]
        lines.append(setting(key, value))
    return "\n".join(lines) + "\n"


def _whole(path: Path) -> Path:
    """What a container has to see of a path: a snapshot in the hub's cache links two levels up."""
    whole = path.parent.parent
    in_cache = path.parent.name == "snapshots" and whole.name.startswith("models--")
    return whole if in_cache else path


def _place(here: str, folder: str, taken: Mapping[str, str]) -> str:
    """Where one file of this machine lies in a container; two of one name lie apart."""
    if here in taken:
        return taken[here]
    place = f"{folder}/{last_part(here)}"
    while place in taken.values():
        place += "-2"
    return place


def _image(table: ServingEngine, device: str) -> str:
    image = table.cpu_image if device == "cpu" else table.image
    if image is None:
        raise BadInput(
            f"{table.title} has no container image for the {device.upper()}, where this was "
            "measured; choose another --engine"
        )
    return image


def _flags(table: ServingEngine, translation: Translation, evidence: Evidence) -> tuple[Flag, ...]:
    """The translated settings with their evidence, all but the model."""
    notes = key_notes(translation, evidence)
    return tuple(
        Flag(key, value, tuple(flag_words(table, key, value)), notes.get(key, ()))
        for key, value in translation.flags().items()
        if key != table.model_key
    )


def _environment(
    translation: Translation, evidence: Evidence
) -> dict[str, tuple[str, tuple[str, ...]]]:
    notes = key_notes(translation, evidence)
    return {name: (value, notes.get(name, ())) for name, value in translation.environment().items()}


def _memory(deployment: Deployment) -> int | None:
    """Bytes of weights and KV cache in host memory; None on a GPU or where they are not known."""
    cache = deployment.measured.get("kv_cache_memory_bytes")
    cache = deployment.config.kv_cache_memory_bytes or cache
    weights = deployment.measured.get("weights_bytes") or _size(Path(deployment.config.model))
    if deployment.evidence.device != "cpu" or not cache or not weights:
        return None
    return int(cache) + weights


def _size(path: Path) -> int:
    """Bytes of a model's weights; 0 if there are none."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))
