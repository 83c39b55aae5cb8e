"""`ping-llm quickstart`."""

from ping_llm.cli.options import settings_command
from ping_llm.quickstart.settings import QuickstartSettings


@settings_command("quickstart", QuickstartSettings)
def command(chosen: QuickstartSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.quickstart.run import quickstart

    result = quickstart(chosen)
    lines = ["relative error on pairs not seen before  median     p90"]
    for name, (error, worst) in result.errors.items():
        lines.append(f"{name:39s} {error:8.4f} {worst:7.3f}")
    lines += [f"loss {result.loss_first:.3f} -> {result.loss_last:.3f} nats per token. Look at:"]
    lines += [f"  {path}  ({what})" for what, path in result.files.items()]
    return result, "\n".join(lines)
