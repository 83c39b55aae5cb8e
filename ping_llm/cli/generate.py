"""`ping-llm generate`."""

from ping_llm.cli.options import settings_command
from ping_llm.prediction.settings import GenerateSettings


@settings_command("generate", GenerateSettings)
def command(chosen: GenerateSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.prediction.generate import GenerateResult, generate
    from ping_llm.text import safe

    result = generate(chosen)
    if not isinstance(result, GenerateResult):
        return result, "\n".join(map(safe, result.text.split("\n")))
    names = ("event_time", "src_addr", "dst_addr", "ip_version", "rtt")
    lines = [",".join(names)]
    for each in result.measurements:
        lines.append(",".join("" if each[name] is None else str(each[name]) for name in names))
    return result, "\n".join(lines)
