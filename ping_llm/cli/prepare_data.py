"""`ping-llm prepare-data`."""

import dataclasses

import click

from ping_llm.cli.options import common_options, print_result


@click.command("prepare-data")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--output", required=True, metavar="DIR", help="Where the rows go; may be remote.")
@click.option(
    "--split",
    type=click.Choice(["pair", "time", "probe"]),
    default="pair",
    show_default=True,
    help="What valid and test are held out by.",
)
@click.option(
    "--valid-fraction", type=float, default=0.05, show_default=True, help="Held out for choices."
)
@click.option(
    "--test-fraction", type=float, default=0.1, show_default=True, help="Held out for reporting."
)
@click.option(
    "--both-ends",
    is_flag=True,
    help="Let train measurements also count as made from their destinations.",
)
@click.option(
    "--row-cap-mb", type=float, default=8, show_default=True, help="Largest row, in 1e6 bytes."
)
@click.option(
    "--memory-limit", default="4GB", show_default=True, help="Most memory, like 4GB or 512MiB."
)
@click.option("--workers", type=int, help="Threads.  [default: one a CPU]")
@click.option(
    "--engine",
    type=click.Choice(["local", "spark"]),
    default="local",
    show_default=True,
    help="What sorts.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Decides which pairs or probes."
)
@common_options
def command(inputs: tuple[str, ...], output: str, as_json: bool, **settings) -> None:
    """Turn measurements into probe rows for training.

    INPUT is a file, a directory or a glob of Parquet, Arrow or CSV measurements, or of RIPE Atlas
    ping results (NDJSON; also .gz, .bz2, .xz, .zst). Each INPUT is one input to `--split time`.
    Records that cannot be used are counted by reason and kept in OUTPUT/rejected.parquet.
    """
    from ping_llm.ingest.prepare import prepare_data

    result = prepare_data(inputs, output=output, **settings)
    rows = ", ".join(f"{n:,} {split}" for split, n in result.rows.items())
    text = (
        f"{result.measurements:,} measurements ({result.failed:,} failed) "
        f"of {result.probes:,} probes in {rows} rows: {output}"
    )
    for reason, n in result.rejected.items():
        text += f"\nrejected: {n:,} x {reason} (see {output}/rejected.parquet)"
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
