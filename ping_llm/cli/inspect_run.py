"""`ping-llm inspect-run`."""

from ping_llm.cli.options import settings_command
from ping_llm.training.settings import InspectRunSettings

SHOWN = 12  # lines of losses


@settings_command("inspect-run", InspectRunSettings)
def command(chosen: InspectRunSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.text import safe
    from ping_llm.training.inspect_run import inspect_run

    result = inspect_run(chosen)
    skipped = f", {result.skipped_steps:,.0f} skipped" if result.skipped_steps else ""
    lines = [
        f"{result.run}: {result.kind}, {result.parameters:,} parameters, "
        f"{result.bytes / 1e6:,.1f} MB",
        f"step {result.step:,} of {result.steps:,}{skipped}, {result.tokens:,} tokens, "
        f"{result.seconds:,.0f} s",
        f"data {safe(str(result.data['path']))} ({result.data['now']}), "
        f"{result.known_bytes / 1e6:,.1f} MB known",
    ]
    if result.changed:
        values = {"model": result.model, **result.settings}
        changed = ", ".join(f"{name}={safe(str(values[name]))}" for name in result.changed)
        lines.append(f"settings of preset {result.settings.get('preset')}, but {changed}")
    names = ("loss", "loss_rtt", "valid_loss", "valid_loss_rtt", "valid_objective")
    if result.losses:
        lines.append(f"{'step':>9s}" + "".join(f"{name:>16s}" for name in names))
    n = len(result.losses)
    shown = sorted({round(i * (n - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if n else []
    for row in (result.losses[i] for i in shown):
        cells = (row.get(name) for name in names)
        text = "".join(f"{'-' if cell is None else format(cell, '.4f'):>16s}" for cell in cells)
        lines.append(f"{row['step']:>9,d}{text}")
    for each in result.checkpoints:
        objective = each["objective"]
        valid = "" if objective is None else f"  valid objective {objective:.4f}"
        best = "  (the best)" if each["best"] else ""
        lines.append(f"checkpoint {each['step']:>9,d}  {each['bytes'] / 1e6:,.1f} MB{valid}{best}")
    return result, "\n".join(lines)
