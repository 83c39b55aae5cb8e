"""`ping-llm verify-parity`."""

from ping_llm.cli.options import settings_command
from ping_llm.extraction.settings import VerifyParitySettings


@settings_command("verify-parity", VerifyParitySettings)
def command(chosen: VerifyParitySettings) -> tuple[object, str]:
    """Runs `verify_parity`."""
    from ping_llm.extraction.parity import verify_parity

    result = verify_parity(chosen)
    lines = [f"{name:>16}  {value:.1e}" for name, value in result.by_site.items()]
    lines.append(f"largest relative L2 {result.max_relative_l2:.1e} over {result.tokens} tokens")
    return result, "\n".join(lines)
