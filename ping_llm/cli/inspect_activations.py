"""`ping-llm inspect-activations`."""

from ping_llm.activations.settings import InspectActivationsSettings
from ping_llm.cli.options import settings_command
from ping_llm.text import safe


@settings_command("inspect-activations", InspectActivationsSettings)
def command(chosen: InspectActivationsSettings) -> tuple[object, str, int]:
    """Runs `inspect_activations`."""
    from ping_llm.activations.inspection import inspect_activations

    result = inspect_activations(chosen)
    lines = [
        f"{chosen.url}: {result.units_done:,} of {result.units:,} units, "
        f"{result.samples:,} samples, {result.tokens:,} tokens, {result.bytes / 1e9:,.2f} GB",
        safe(f"made from {result.made_from.get('model')} and {result.made_from.get('input')}"),
        f"sites {', '.join(result.sites)}  layers {', '.join(map(str, result.layers)) or '-'}  "
        f"[{result.tokens:,}, {result.d_model:,}] {result.dtype}",
    ]
    for name, worker in result.workers.items():
        rate = worker.tokens / worker.seconds if worker.seconds else 0.0
        line = (
            f"{safe(name)}: {worker.units:,} units, {worker.tokens:,} tokens, {rate:,.0f} tokens/s"
        )
        if worker.leased:
            unknown = "--watch tells whether it is alive"
            stale = unknown if worker.stale is None else f"{len(worker.stale):,} of them stale"
            line += f"; holds {len(worker.leased):,} units, {stale}"
        lines.append(line)
    if not result.complete:
        eta = result.eta_seconds
        left = "unknown" if eta is None else f"about {eta:,.0f} s, if all who hold units are alive"
        lines.append(f"time left: {left}")
    for name, values in result.statistics.items():
        if values:
            at_first = values["first_token_norm_mean"]
            first = "" if at_first is None else f"at position 0 {at_first:,.2f}, "
            lines.append(
                f"{safe(name):>16}  norm {values['norm_mean']:,.2f}, {first}"
                f"most {values['norm_max']:,.2f}; "
                f"{values['sink_tokens']:,} sinks, {values['sink_tokens_at_first']:,} at position 0"
            )
    lines += [f"error: {error}" for error in result.errors]
    if chosen.verify and not result.errors:
        lines.append("every checksum fits")
    return result, "\n".join(lines), int(bool(result.errors))
