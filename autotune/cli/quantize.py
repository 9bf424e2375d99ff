"""`autotune quantize`: a quantized checkpoint with a report of what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from autotune.cli.console import data_console, message_console, note, print_json
from autotune.cli.exits import ExitCode
from autotune.cli.interrupt import stop_on_interrupt
from autotune.cli.layer_progress import LayerProgress
from autotune.errors import BadInput, Interrupted

if TYPE_CHECKING:
    from autotune.quantize.job import JobResult

_CALIBRATION = "Calibration"


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a Hugging Face model in floats; 'embedded' is the small one that "
            "comes with the program.",
            show_default=False,
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="rtn (round to nearest), gptq, awq (both 4 bits in groups by default), "
            "smoothquant (int8 weights and activations), fp8 (e4m3 weights and activations), or "
            "none (with --sparsity alone).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the checkpoint; must be new or empty.",
            show_default=False,
        ),
    ],
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            help="Bits of a weight: 4 or 8. rtn with 8 and no --group-size makes activations int8 "
            "too (W8A8). Default: 4 for rtn, gptq and awq, 8 for smoothquant and fp8.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Columns that share a scale: 16, 32, 64, 128 or 256. A layer whose columns it "
            "does not divide gets a smaller one. Default: 64.",
        ),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether groups have a scale alone, which every reader takes, or a zero point "
            "too, which follows the weights closer.",
        ),
    ] = True,
    granularity: Annotated[
        str,
        typer.Option(
            "--granularity", help="fp8: one scale for each output channel, or for the whole tensor."
        ),
    ] = "channel",
    act_order: Annotated[
        bool,
        typer.Option(
            "--act-order/--no-act-order",
            help="gptq: round the columns with the largest activations first.",
        ),
    ] = True,
    sparsity: Annotated[
        str,
        typer.Option(
            "--sparsity",
            help="2:4 sets two of every four weights to zero (by Wanda's scores) before the method "
            "rounds; stored like dense weights.",
        ),
    ] = "none",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Text file (UTF-8) that gptq, awq, smoothquant and 2:4 read. Default: a built-in "
            "sample of English documentation.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(
            "--workload",
            help="Calibrate on the prompts of this trace instead (ShareGPT, OpenAI batch, vLLM "
            "custom and others that hold texts).",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    workload_format: Annotated[
        str | None,
        typer.Option(
            "--workload-format",
            help="Format of the trace; by default recognised from its content.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int,
        typer.Option(
            "--calibration-tokens",
            help="Most tokens of the text that go through the model.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = 32768,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="Picks the windows where the text has more tokens.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = 0,
    device: Annotated[
        str,
        typer.Option("--device", help="Where to calibrate and measure: auto, cpu or cuda."),
    ] = "auto",
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality",
            help="Measure perplexity, KL divergence and top-1 agreement against the original on "
            "held-out text; needs memory for a whole model.",
        ),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on in the folder of an interrupted run, with the same options."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the result.")
    ] = False,
) -> None:
    """Quantize a model into a compressed-tensors checkpoint.

    Works layer by layer, so that memory holds one layer and its calibration. Writes the checkpoint
    with quality.json and README.md. The output head stays in floats. nf4 and llm_int8 cannot be
    written; they are applied when a model is loaded (--quantization nf4). Exit code 130:
    interrupted, to be continued with --resume.
    """
    from autotune.embedded import TARGET
    from autotune.quantize.job import QuantizeJob, quantize_model
    from engine.quantize.options import WriteOptions

    grouped = method in ("gptq", "awq") or (method == "rtn" and (bits != 8 or bool(group_size)))
    options = WriteOptions(
        method=method,  # type: ignore[arg-type]  # it refuses what it does not know
        bits=bits,
        group_size=group_size,
        symmetric=None if symmetric and not grouped else symmetric,
        granularity=granularity,  # type: ignore[arg-type]
        activation_order=act_order,
        sparsity=sparsity,  # type: ignore[arg-type]
        calibration_tokens=calibration_tokens,
        seed=seed,
    )
    _refuse_idle(options.calibrated, calibration, workload)
    job = QuantizeJob(
        model=str(TARGET) if model == "embedded" and not Path(model).exists() else model,
        out=output,
        options=options,
        calibration=calibration,
        workload=workload,
        workload_format=workload_format,
        device=device,
        quality=quality,
        resume=resume,
    )
    stopping = "Stopping after this layer. Press Ctrl-C again to leave at once; layers are kept."
    with (
        stop_on_interrupt(stopping) as stop,
        LayerProgress(message_console(), "quantizing") as progress,
    ):
        try:
            result = quantize_model(job, on_layer=progress.layer, say=progress.say, stop=stop)
        except (Interrupted, KeyboardInterrupt) as error:
            text = str(error) or "stopped at once; finished layers are kept"
            note(f"Interrupted: {text}. Go on with the same command and --resume.")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)


def _refuse_idle(calibrated: bool, calibration: Path | None, workload: Path | None) -> None:
    given = "--calibration" if calibration else "--workload" if workload else None
    if given and not calibrated:
        raise BadInput(
            f"{given} has no effect: rtn and fp8 look at weights alone; leave it out, or choose "
            "gptq, awq, smoothquant or --sparsity 2:4"
        )


def _print(result: JobResult) -> None:
    from autotune.quantize.report import figures, megabytes

    written, console = result.written, data_console()
    ratio = written.source_bytes / written.written_bytes
    console.print(f"{written.options.describe()}  in {result.seconds:.1f} s", markup=False)
    console.print(
        f"{megabytes(written.source_bytes)} -> {megabytes(written.written_bytes)} "
        f"({ratio:.2f} times smaller)",
        markup=False,
    )
    if result.quality is not None:
        own, reference = (result.quality[n] for n in ("perplexity", "reference_perplexity"))
        if own is not None and reference is not None:
            console.print(f"perplexity {reference:.4g} -> {own:.4g} on held-out text")
        table = Table(box=None, pad_edge=False)
        for heading in ("against the original", "value", "95% interval"):
            table.add_column(heading, justify="left" if "against" in heading else "right")
        for row in figures(result.quality):
            table.add_row(*row)
        console.print(table)
    for text in result.notes:
        note(f"note: {text}")
    console.print(str(written.folder), markup=False, soft_wrap=True)
