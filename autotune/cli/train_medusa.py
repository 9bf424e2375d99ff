"""`autotune train-medusa`: heads that draft for a model, trained on the user's text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from autotune.cli.console import data_console, message_console, note, print_json
from autotune.cli.exits import ExitCode
from autotune.cli.interrupt import stop_on_interrupt
from autotune.cli.training_progress import TrainingProgress
from autotune.errors import Interrupted

if TYPE_CHECKING:
    from autotune.medusa.accuracy import Accuracy
    from autotune.medusa.job import JobResult

_SHOWN_RANKS = 4
_STOPPING = (
    "Stopping after this step; what the heads have learned is written. Press Ctrl-C again to leave "
    "at once."
)


def train_medusa(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a Hugging Face model; 'embedded' is the small one that comes with the "
            "program.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the heads; must be new or empty.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text file (UTF-8) like what the model is asked for and answers; may be given "
            "more than once. The embedded model has text of its own.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        int, typer.Option("--heads", help="How many tokens ahead are guessed, one by each head.")
    ] = 4,
    layers: Annotated[int, typer.Option("--layers", help="Residual blocks of each head.")] = 1,
    own_output: Annotated[
        bool,
        typer.Option(
            "--own-output/--shared-output",
            help="Whether each head has an output projection of its own, as heads were first "
            "published, or all end in the model's, which takes far less memory and time.",
        ),
    ] = False,
    minutes: Annotated[
        float,
        typer.Option("--minutes", help="How long to train, once the model is loaded."),
    ] = 5.0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="Steps to take, however long they last: runs with the same --seed then repeat.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Which text is held out, and the order of the rest.")
    ] = 0,
    device: Annotated[
        str, typer.Option("--device", help="Where to train: auto, cpu or cuda.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the result.")
    ] = False,
) -> None:
    """Train Medusa heads, which draft for a model from its own states.

    The model stays as it is. It writes on from pieces of the text, and the heads learn to guess
    what it wrote, and what the text says, some tokens ahead. A tenth is held out and tells how
    often they are right. Use the folder with --speculative-method medusa --speculative-model
    FOLDER. Exit code 130: interrupted; heads that had begun to learn are written as far as they
    came.
    """
    from autotune.embedded import TARGET
    from autotune.medusa.job import TrainMedusaJob
    from autotune.medusa.job import train_medusa as train

    job = TrainMedusaJob(
        model=str(TARGET) if model == "embedded" and not Path(model).exists() else model,
        out=output,
        texts=tuple(text or ()),
        num_heads=heads,
        num_layers=layers,
        own_output=own_output,
        minutes=minutes,
        steps=steps,
        seed=seed,
        device=device,
    )
    with stop_on_interrupt(_STOPPING) as stop, TrainingProgress(message_console()) as progress:
        try:
            result = train(job, listen=progress, stop=stop)
        except (Interrupted, KeyboardInterrupt) as error:
            note(f"Interrupted: {str(error) or 'stopped at once'}. Nothing was written.")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)
    if result.interrupted:
        note(f"Interrupted: the heads in {output} are as good as {result.steps} steps made them.")
        raise typer.Exit(ExitCode.INTERRUPTED)


def _print(result: JobResult) -> None:
    console = data_console()
    console.print(
        f"{result.steps} steps over {result.samples} places  in {result.seconds:.0f} s",
        markup=False,
    )
    _print_accuracy("after what the model writes", result.written)
    _print_accuracy("in the text", result.text)
    console.print(str(result.job.out), markup=False, soft_wrap=True)


def _print_accuracy(where: str, accuracy: Accuracy) -> None:
    console = data_console()
    table = Table(box=None, pad_edge=False)
    table.add_column(f"right {where}", justify="left")
    ranks = min(_SHOWN_RANKS, len(accuracy.by_rank[0]))
    for rank in range(ranks):
        table.add_column("likeliest" if rank == 0 else f"rank {rank + 1}", justify="right")
    for head, shares in enumerate(accuracy.by_rank):
        name = f"head {head + 1} ({head + 1} ahead)"
        table.add_row(name, *(f"{100 * share:.1f}%" for share in shares[:ranks]))
    console.print(table)
    yields = ", ".join(f"{size}: {value:.2f}" for size, value in accuracy.tokens_per_step.items())
    if yields:
        console.print(f"tokens a step by drafted tokens  {yields}", markup=False)
