"""`ping-llm inspect-activations`."""

import dataclasses

import click

from ping_llm.cli.options import common_options, print_result


@click.command("inspect-activations")
@click.argument("url")
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
@click.option(
    "--watch", is_flag=True, help="Watch leases for their length, to find those of the dead."
)
@common_options
def command(url: str, verify: bool, watch: bool, as_json: bool) -> None:
    """Show what an activation store holds, whether it is whole, and who is at work on it.

    With --verify the exit code is 1 if anything is damaged.
    """
    from ping_llm.activations.inspection import inspect_activations

    result = inspect_activations(url, verify=verify, watch=watch)
    lines = [
        f"{url}: {result.units_done:,} of {result.units:,} units, {result.samples:,} samples, "
        f"{result.tokens:,} tokens, {result.bytes / 1e9:,.2f} GB",
        f"made from {result.made_from['model']} and {result.made_from['input']}",
        f"sites {', '.join(result.sites)}  layers {', '.join(map(str, result.layers)) or '-'}  "
        f"[{result.tokens:,}, {result.d_model:,}] {result.dtype}",
    ]
    for name, worker in result.workers.items():
        rate = worker.tokens / worker.seconds if worker.seconds else 0.0
        line = f"{name}: {worker.units:,} units, {worker.tokens:,} tokens, {rate:,.0f} tokens/s"
        if worker.leased:
            unknown = "whether it lives takes --watch to see"
            stale = unknown if worker.stale is None else f"{len(worker.stale):,} of them stale"
            line += f"; holds {len(worker.leased):,} units, {stale}"
        lines.append(line)
    if not result.complete:
        eta = result.eta_seconds
        left = "unknown" if eta is None else f"about {eta:,.0f} s, if all who hold units live"
        lines.append(f"time left: {left}")
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
