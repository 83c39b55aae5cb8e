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
    if result.divergence is not None:
        for which, unit in (("kl", " nats"), ("wasserstein", "")):
            each = result.divergence[which]
            lines.append(
                f"{which} of half the measurements of a pair from: their other half "
                f"{each['half']:.3f}{unit}, predicted {each['with_time']:.3f}, "
                f"without time {each['without_time']:.3f}"
            )
    if result.field_orders is not None:
        names = ("last", "first", "marginal", "constant")
        lines.append(f"{'nats a field, asked':23s}" + "".join(f"{name:>10s}" for name in names))
        for field, each in result.field_orders.items():
            lines.append(f"{field:23s}" + "".join(f"{each[name]:10.3f}" for name in names))
    for each in result.tokens or []:
        lines.append(
            f"{each['position']:5d} {each['field']:12s} {each['actual']:18s}"
            f" {each['p_actual']:7.2%}  {each['predicted']:18s} {each['p_predicted']:7.2%}"
        )
    return result.to_json(), "\n".join(lines)
