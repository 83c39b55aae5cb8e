"""`ping-llm predict`."""

from typing import TYPE_CHECKING

from ping_llm.cli.options import settings_command
from ping_llm.prediction.settings import PredictSettings

if TYPE_CHECKING:
    from ping_llm.prediction.predict import PairAnswer


@settings_command("predict", PredictSettings)
def command(chosen: PredictSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.prediction.predict import PairAnswer, PairsResult, predict

    result = predict(chosen)
    if isinstance(result, PairAnswer):
        return result, _line(result)
    if isinstance(result, PairsResult):
        rate = result.pairs_per_second
        speed = "" if rate is None else f"  {rate:,.0f} pairs/s"
        return result, f"{result.pairs:,} pairs{speed}  {result.output}"
    return result, "\n".join(map(_line, result.ranked))


def _line(answer: "PairAnswer") -> str:
    rtt = answer.rtt_ms
    text = (
        f"{answer.src} -> {answer.dst}  {rtt['mode']:.2f} ms"
        f"  (50 %: {rtt['p25']:.2f} to {rtt['p75']:.2f}, 90 %: {rtt['p5']:.2f} to {rtt['p95']:.2f},"
        f" mean {rtt['mean']:.2f})  fails {answer.p_failed:.1%}"
    )
    text += f"  [nothing known of: {', '.join(answer.unseen)}]" if answer.unseen else ""
    text += f"  [{answer.later} later measurements left out]" if answer.later else ""
    for each in answer.explained or []:
        text += f"\n  {each.share:6.1%} by {each.src} -> {each.dst}  {each.rtt_ms:.2f} ms"
    return text
