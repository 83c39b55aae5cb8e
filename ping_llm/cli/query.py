"""`ping-llm query`."""

from ping_llm.cli.options import settings_command
from ping_llm.prediction.settings import QuerySettings


@settings_command("query", QuerySettings)
def command(chosen: QuerySettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.prediction.query import query

    result = query(chosen)
    lines = []
    if result.rtt_ms is not None:
        rtt = result.rtt_ms
        lines.append(
            f"{rtt['mode']:.2f} ms  (50 %: {rtt['p25']:.2f} to {rtt['p75']:.2f}, 90 %: "
            f"{rtt['p5']:.2f} to {rtt['p95']:.2f}, mean {rtt['mean']:.2f})"
            f"  fails {result.p_failed:.1%}"
        )
    for each in result.completions:
        hour = "" if each.hour is None else f"  {each.hour:02d}:00 to {each.hour:02d}:59 UTC"
        lines.append(f"{each.probability:7.2%}  {each.src} -> {each.dst}{hour}")
    note = f"{result.weighed:,} weighed, {result.covered:.1%} of what is possible"
    if result.p_rtt is not None:
        note += f"; the RTT has {result.p_rtt:.2%} before what is asked is known"
    return result, "\n".join([*lines, note])
