"""`ping-llm evaluate`."""

from ping_llm.cli.options import settings_command
from ping_llm.prediction.settings import EvaluateSettings


@settings_command("evaluate", EvaluateSettings)
def command(chosen: EvaluateSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.prediction.evaluate import evaluate

    result = evaluate(chosen)
    lines = [
        f"{result.protocol}: {result.n:,} measurements of {result.pairs:,} pairs"
        f" (errors of one value each; 95 % intervals by bootstrap over pairs)",
        f"{'':23s} {'kind':7s} {'median rel':>24s} {'p90 rel':>24s} {'median ms':>10s}",
    ]
    for name, scores in result.methods.items():
        cells = [
            "{:8.4f} [{:.4f}, {:.4f}]".format(scores[key], *scores["intervals"][key])
            for key in ("median_rel", "p90_rel")
        ]
        lines.append(
            f"{name:23s} {scores['kind']:7s} {cells[0]:>24s} {cells[1]:>24s}"
            f" {scores['median_abs_ms']:10.3f}"
        )
    coverage = result.calibration["coverage"].items()
    shown = ", ".join(f"{level} % covers {fraction:.1%}" for level, fraction in coverage)
    lines.append(f"intervals of the model: {shown}")
    return result.to_json(), "\n".join(lines)
