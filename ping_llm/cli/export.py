"""`ping-llm export`."""

from ping_llm.cli.options import settings_command
from ping_llm.training.settings import ExportSettings


@settings_command("export", ExportSettings)
def command(settings: ExportSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.training.export import export_run

    result = export_run(settings)
    size = f"{result.bytes / 1e6:,.1f} MB"
    return result, f"{result.parameters:,} parameters, {size} in {result.output}"
