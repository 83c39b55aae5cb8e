"""`ping-llm evaluate`."""

from pathlib import Path
from typing import Any

import click

from ping_llm.cli.options import common_options, print_result


@click.command("evaluate")
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Run directory of the model."
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="Directory of probe rows, or a file of measurements.",
)
@click.option(
    "--baselines",
    default="all",
    show_default=True,
    metavar="all|none|A,B",
    help="Classical methods to put beside the model.",
)
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Measurements to score at most, drawn at random.",
)
@click.option(
    "--contexts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Contexts drawn for each question, whose answers are averaged (split pair, or files).",
)
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Write one HTML page."
)
@common_options
def command(as_json: bool, **arguments: Any) -> None:
    """Compare a model with classical methods.

    All methods are scored on the same measurements. On probe rows these are the test rows, by the
    protocol of the split; on a file of measurements all of them.
    """
    from ping_llm.prediction.evaluate import evaluate

    result = evaluate(**arguments)
    lines = [
        f"{result['protocol']}: {result['n']:,} measurements of {result['pairs']:,} pairs"
        f" (errors of the median; 95 % intervals by bootstrap over pairs)",
        f"{'':14s} {'kind':7s} {'median rel':>24s} {'p90 rel':>24s} {'median ms':>10s}",
    ]
    for name, scores in result["methods"].items():
        cells = [
            "{:8.4f} [{:.4f}, {:.4f}]".format(scores[key], *scores["intervals"][key])
            for key in ("median_rel", "p90_rel")
        ]
        lines.append(
            f"{name:14s} {scores['kind']:7s} {cells[0]:>24s} {cells[1]:>24s}"
            f" {scores['median_abs_ms']:10.3f}"
        )
    covered = result["calibration"]["coverage"]
    shown = ", ".join(f"{level} % covers {part:.1%}" for level, part in covered.items())
    lines.append(f"intervals of the model: {shown}")
    print_result(result, as_json=as_json, text="\n".join(lines))
