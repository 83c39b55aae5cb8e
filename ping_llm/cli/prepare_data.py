"""`ping-llm prepare-data`."""

from ping_llm.cli.options import settings_command
from ping_llm.ingest.settings import PrepareSettings


@settings_command("prepare-data", PrepareSettings)
def command(chosen: PrepareSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.ingest.prepare import prepare_data

    result = prepare_data(chosen)
    rows = ", ".join(f"{n:,} {split}" for split, n in result.rows.items())
    text = (
        f"{result.measurements:,} measurements ({result.failed:,} failed) "
        f"of {result.probes:,} probes in {rows} rows: {chosen.output}"
    )
    for reason, n in result.rejected.items():
        text += f"\nrejected: {n:,} x {reason} (see {chosen.output}/rejected.parquet)"
    return result, text
