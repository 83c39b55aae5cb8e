"""`ping-llm inspect-data`."""

from ping_llm.cli.options import settings_command
from ping_llm.inspection.settings import InspectDataSettings


@settings_command("inspect-data", InspectDataSettings)
def command(chosen: InspectDataSettings) -> tuple[object, str]:
    """Runs the command."""
    import shutil
    import sys

    from ping_llm.inspection.dataset import inspect_data
    from ping_llm.inspection.terminal import terminal_text

    result = inspect_data(chosen)
    width = min(shutil.get_terminal_size().columns, 120)
    return result, terminal_text(result, width=width, colour=sys.stdout.isatty())
