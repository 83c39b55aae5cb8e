"""`ping-llm serve`."""

from typing import TYPE_CHECKING

from ping_llm.cli.options import settings_command
from ping_llm.errors import ConfigError
from ping_llm.serve.settings import ServeSettings

if TYPE_CHECKING:
    from ping_llm.serve.run import ServeResult


@settings_command("serve", ServeSettings)
def command(chosen: ServeSettings) -> "tuple[ServeResult, str]":
    """Runs the command."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; run pip install 'ping-llm[serve]'"
        ) from None
    from ping_llm.serve.run import serve

    result = serve(chosen)
    return result, f"{result.questions:,} questions answered in {result.seconds:,.0f} s"
