"""`ping-llm inspect-activations`."""

import dataclasses

import click

from ping_llm.cli.options import common_options, print_result


@click.command("inspect-activations")
@click.argument("url")
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
@common_options
def command(url: str, verify: bool, as_json: bool) -> None:
    """Show what an activation store holds, and whether it is whole.

    With --verify the exit code is 1 if anything is damaged.
    """
    from ping_llm.extraction.reader import inspect_activations

    result = inspect_activations(url, verify=verify)
    lines = [
        f"{url}: {result.units_done:,} of {result.units:,} units, {result.samples:,} samples, "
        f"{result.tokens:,} tokens, {result.bytes / 1e9:,.2f} GB",
        f"made from {result.made_from['model']} and {result.made_from['input']}",
        f"sites {', '.join(result.sites)}  layers {', '.join(map(str, result.layers)) or '-'}  "
        f"[{result.tokens:,}, {result.d_model:,}] {result.dtype}",
    ]
    for name, values in result.statistics.items():
        if values:
            lines.append(
                f"{name:>16}  norm {values['norm_mean']:,.2f}, at position 0 "
                f"{values['first_token_norm_mean']:,.2f}, most {values['norm_max']:,.2f}; "
                f"{values['sink_tokens']:,} sinks, {values['sink_tokens_at_first']:,} at position 0"
            )
    lines += [f"error: {error}" for error in result.errors]
    if verify and not result.errors:
        lines.append("every checksum fits")
    print_result(dataclasses.asdict(result), as_json=as_json, text="\n".join(lines))
    if result.errors:
        click.get_current_context().exit(1)
