"""What a run came to, for a person or as JSON, and its exit code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from autotune.cli.console import note, print_json
from autotune.cli.exits import ExitCode

if TYPE_CHECKING:
    from autotune.records import RunFolder


def tell_outcome(
    record: Mapping[str, Any], folder: RunFolder, as_json: bool, more: Mapping[str, Any]
) -> None:
    """Print the result in `record`, the content of `run.json`; `more` joins the JSON.

    Raises:
        typer.Exit: no configuration meets the SLO.
    """
    from autotune.cli.run_summary import print_summary

    result = record["result"]
    trials = folder.read_trials()
    if result is None:
        reason = next((t.reason for t in trials if t.reason), "nothing finished in time")
        note(f"No configuration could be measured: {reason}")
        # The keys of a result stay, with nothing in them.
        result = dict.fromkeys(("baseline", "winner", "gain", "verdict", "winner_config"))
        result |= {"slo_met": False, "proven": False, "changes": {}}
    elif not as_json:
        print_summary(record, folder)
    if as_json:
        keys = ("baseline", "winner", "gain", "proven", "verdict", "changes", "winner_config")
        print_json(
            {
                "slo_met": result["slo_met"],
                "objective": record["objective"],
                **{key: result[key] for key in keys},
                "run_folder": str(folder.path),
                "trials": sum(t.kind == "search" for t in trials),
                "seconds": sum(t.seconds for t in trials),
                **more,
            }
        )
    if not result["slo_met"]:
        raise typer.Exit(ExitCode.SLO_NOT_MET)
