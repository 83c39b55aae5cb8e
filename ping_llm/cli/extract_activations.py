"""`ping-llm extract-activations`."""

from ping_llm.cli.options import settings_command
from ping_llm.extraction.settings import ExtractSettings


@settings_command("extract-activations", ExtractSettings)
def command(chosen: ExtractSettings) -> tuple[object, str]:
    """Runs `extract_activations`."""
    from ping_llm.extraction.run import DryRunResult, extract_activations

    result = extract_activations(chosen)
    if isinstance(result, DryRunResult):
        shapes = ", ".join(f"{rows} x {width}" for rows, width in result.shapes)
        return result, (
            f"{result.samples:,} samples, {result.tokens:,} tokens in {result.units:,} units; "
            f"{result.bytes / 1e9:,.2f} GB in {len(result.bytes_by_array)} arrays; "
            f"batches of {shapes}, {result.padding_fraction:.1%} padding; "
            f"{result.overlong:,} overlong, {result.empty:,} empty"
        )
    return result, (
        f"{result.samples:,} samples, {result.tokens:,} tokens, "
        f"{result.tokens_per_second:,.0f} tokens/s, {result.bytes_written / 1e9:,.2f} GB, "
        f"{result.padding_fraction:.1%} padding; {result.overlong:,} overlong, "
        f"{result.empty:,} empty  {result.output}"
    )
