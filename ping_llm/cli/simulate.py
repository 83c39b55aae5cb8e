"""`ping-llm simulate`."""

from ping_llm.cli.options import settings_command
from ping_llm.simulation.settings import SimulateSettings


@settings_command("simulate", SimulateSettings)
def command(chosen: SimulateSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.simulation.simulate import simulate

    result = simulate(chosen)
    text = f"{result.measurements:,} measurements, {result.bytes / 1e6:.1f} MB  {result.output}"
    return result, text
