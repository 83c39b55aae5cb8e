"""`ping-llm train-sae`."""

from ping_llm.cli.options import settings_command
from ping_llm.sae.settings import TrainSaeSettings


@settings_command("train-sae", TrainSaeSettings)
def command(chosen: TrainSaeSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.sae.loop import train_sae

    result = train_sae(chosen)
    lines = [
        f"step {result.step}  {result.tokens:,} tokens  "
        f"{result.tokens_per_second:,.0f} tokens/s  {result.output}"
    ]
    for name, measured in result.autoencoders.items():
        lines.append(
            f"{name:>16}  explains {measured['explained_variance']:.2%} of the variance with "
            f"{measured['l0']:.1f} of {result.features:,} features active; "
            f"{measured['never_active']:.1%} never, {measured['dead']:.0f} dead"
        )
    return result, "\n".join(lines)
