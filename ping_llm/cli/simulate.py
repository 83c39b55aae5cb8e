"""`ping-llm simulate`."""

from pathlib import Path

import click

from ping_llm.cli.options import common_options, print_result


@click.command("simulate")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .parquet file.")
@click.option("--probes", default=400, show_default=True, help="Hosts that measure.")
@click.option("--days", default=14.0, show_default=True, help="Time span.")
@click.option("--measurements", default=1_000_000, show_default=True, help="How many to write.")
@click.option("--seed", default=0, show_default=True, help="Another seed, another internet.")
@common_options
def command(
    output: Path, probes: int, days: float, measurements: int, seed: int, as_json: bool
) -> None:
    """Write the measurements of a synthetic internet.

    It has true geography, autonomous systems with prefixes, access technologies, load by the time
    of day, route changes, outages, IPv4 and IPv6. Addresses are private ones (10.0.0.0/8 and
    fd00::/16). The same settings give the same file; a finished one is left as it is.
    """
    import dataclasses

    from ping_llm.simulation.simulate import simulate

    result = simulate(output, probes=probes, days=days, measurements=measurements, seed=seed)
    text = f"{result.measurements:,} measurements, {result.bytes / 1e6:.1f} MB  {result.output}"
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
