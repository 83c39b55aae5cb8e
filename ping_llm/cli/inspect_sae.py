"""`ping-llm inspect-sae`."""

from ping_llm.cli.options import settings_command
from ping_llm.sae.settings import InspectSaeSettings

LINES = 10  # features in the text


@settings_command("inspect-sae", InspectSaeSettings)
def command(chosen: InspectSaeSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.sae.inspection import inspect_sae

    result = inspect_sae(chosen)
    where = "held-out prompts" if result.held_out else "prompts not known to be held out"
    lines = [
        f"{result.architecture}, {result.d_sae:,} features of width {result.d_in:,}: explains "
        f"{result.explained_variance:.2%} of the variance with {result.l0:.1f} active, on {where}; "
        f"{result.never_active:,} never active on {result.tokens:,} tokens"
    ]
    for name, loss in (result.losses or {}).items():
        recovered = "" if loss.recovered is None else f"  {loss.recovered:.2%} recovered"
        lines.append(
            f"{name:>12}  {loss.model:.4f} nats, with the autoencoder {loss.autoencoder:.4f}, "
            f"with zeros {loss.zero:.4f}{recovered}"
        )
    for report in result.features[:LINES]:
        named = "; ".join(
            f"{each.property} {each.category} {each.within:.0%} ({each.base:.0%})"
            for each in report.associations[:2]
        )
        lines.append(f"{f'#{report.feature}':>12}  on {report.density:.3%} of the tokens  {named}")
    if chosen.report is not None:
        lines.append(f"report: {chosen.report}")
    return result, "\n".join(lines)
