"""One HTML page about an evaluation."""

from collections.abc import Mapping
from typing import Any

from ping_llm import report
from ping_llm.outputs import Claim
from ping_llm.report import Html
from ping_llm.storage import Location

_HEADINGS = {
    "family": "By family",
    "rtt_band": "By actual RTT",
    "kind": "By kind of measurement",
    "history": "By measurements that the answer was drawn from",
    "hour_utc": "By hour of the day (UTC)",
    "asn": "By autonomous system of the source",
    "country": "By country of the source",
    "distance": "By distance",
}


def write_report(
    result: Mapping[str, Any], location: Location, *, title: str, claim: Claim | None = None
) -> None:
    """Writes a page about the JSON of what `evaluate` returned, under a claim."""
    methods, calibration = result["methods"], result["calibration"]
    errors = report.picture(_errors_figure(methods), "relative errors by method")
    sections = [
        ("What was scored", [_facts(result)]),
        ("Errors of the prediction", [_methods(methods), errors]),
    ]
    if "history" in result:
        history = result["history"]
        picture = report.picture(_history_figure(history), "errors against what is known")
        heading = "Errors by known measurements of the new source"
        sections.append((heading, [picture, _history_table(history)]))
    reliability = report.picture(_calibration_figure(calibration), "reliability of the model")
    sections += [
        ("Calibration of the model", [reliability, _calibration_table(calibration)]),
        ("Failures", [_failures(result["failures"])]),
        ("Ranking of destinations", [_rankings(result["ranking"])]),
    ]
    sections += [(_HEADINGS[name], [_groups(groups)]) for name, groups in result["by"].items()]
    if "loss_per_field" in result:
        rows = [(name, f"{loss:.3f}") for name, loss in result["loss_per_field"].items()]
        sections.append(("Loss", [report.table(("field", "nats a token"), rows, numbers="-n")]))
    if "divergence" in result:
        sections.append(("Measured beside predicted RTTs", [_divergence(result["divergence"])]))
    if "field_orders" in result:
        sections.append(("Each field asked last", [_field_orders(result["field_orders"])]))
    if "tokens" in result:
        sections.append(("Tokens, actual and expected", [_tokens(result["tokens"])]))
    blocks = []
    for heading, content in sections:
        blocks += [Html(f"<h2>{report.markup(heading)}</h2>"), *content]
    report.write_page(report.page(title, blocks), location, claim=claim)


def _facts(result: Mapping[str, Any]) -> Html:
    floor = result["noise_floor"]
    rows = [
        ("protocol", result["protocol"]),
        ("answered measurements scored", f"{result['n']:,}"),
        ("failed measurements scored", f"{result['n_failed']:,}"),
        ("there were to choose from", f"{result['rows_available']:,}"),
        ("pairs of addresses", f"{result['pairs']:,}"),
        ("known to all methods", result["context"]),
        ("the run was trained on these data", "yes" if result["trained_on_this_data"] else "no"),
    ]
    if "unseen_fraction" in result:
        rows.append(("with an end of which nothing is known", f"{result['unseen_fraction']:.1%}"))
    if "median_rel" in floor:
        text = f"{floor['median_rel']:.4f} / {floor['p90_rel']:.4f} on {floor['n']:,} measurements"
        rows.append(("noise floor, median / p90 relative (each pair's other rows)", text))
        ratio = floor["ratio"]["median_rel"]
        if ratio is not None:
            rows.append(("the model's median relative error over the floor's", f"{ratio:.1f}"))
    return report.table(("", ""), rows)


def _cell(scores: Mapping[str, Any], name: str, digits: int) -> str:
    low, high = scores["intervals"][name]
    return f"{scores[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _methods(methods: Mapping[str, Mapping[str, Any]]) -> Html:
    headers = ("method", "kind", "median relative", "p90 relative", "median ms", "mean ms")
    digits = {"median_rel": 4, "p90_rel": 4, "median_abs_ms": 3, "mae_ms": 3}
    rows = [
        (name, scores["kind"], *(_cell(scores, key, digits[key]) for key in digits))
        for name, scores in sorted(methods.items(), key=lambda item: item[1]["median_rel"])
    ]
    note = Html("<p>In brackets: 95 % intervals, by bootstrap over pairs of addresses.</p>")
    return Html(report.table(headers, rows, numbers="--nnnn") + note)


def _errors_figure(methods: Mapping[str, Mapping[str, Any]]):
    names = sorted(methods, key=lambda name: -methods[name]["median_rel"])
    fig, axes = report.figure(columns=2, width=9, height=0.6 + 0.32 * len(names))
    titles = {"median_rel": "median relative error", "p90_rel": "90th percentile"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for i, name in enumerate(names):
            value, (low, high) = methods[name][key], methods[name]["intervals"][key]
            colour = report.COLOURS[1 if name.startswith("model") else 0]
            ax.plot([low, high], [i, i], color=colour, linewidth=2)
            ax.plot([value], [i], "o", color=colour, markersize=5)
        report.log_axis(ax)
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names))
        ax.set_title(title)
    return fig


def _history_figure(history: Mapping[str, Mapping[str, Any]]):
    steps = [int(step) for step in history]
    fig, (ax,) = report.figure(width=8, height=4.2)
    for i, name in enumerate(next(iter(history.values()))):
        values = [history[str(step)][name]["median_rel"] for step in steps]
        colour = report.COLOURS[1] if name == "model" else report.COLOURS[(0, 2, 3, 4, 5, 6)[i % 6]]
        (line,) = ax.plot(range(len(steps)), values, marker="osv^Dx*+P"[i % 9], label=name)
        line.set(color=colour, linewidth=2.5 if name == "model" else 1.2, markersize=4)
    ax.set_xticks(range(len(steps)), [str(step) for step in steps])
    ax.set(yscale="log", ylabel="median relative error")
    ax.set_xlabel("measurements of the new source that are given")
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return fig


def _history_table(history: Mapping[str, Mapping[str, Any]]) -> Html:
    names = list(next(iter(history.values())))
    rows = [
        (name, *(f"{scores[name]['median_rel']:.4f}" for scores in history.values()))
        for name in names
    ]
    return report.table(("median relative error", *history), rows, numbers="-" + "n" * len(history))


def _calibration_figure(calibration: Mapping[str, Any]):
    fig, (ax,) = report.figure(width=4.6, height=4.4)
    levels, fractions = zip(*calibration["reliability"], strict=True)
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    ax.plot(levels, fractions, marker="o", markersize=4, color=report.COLOURS[1])
    ax.set_xlabel("level of the predicted quantile")
    ax.set_ylabel("fraction of the measurements below it")
    return fig


def _calibration_table(calibration: Mapping[str, Any]) -> Html:
    rows = [
        (f"{level} % interval covers", f"{fraction:.1%}")
        for level, fraction in calibration["coverage"].items()
    ]
    rows += [
        (f"pinball loss at {level} %", f"{loss:.3f} ms")
        for level, loss in calibration["pinball_ms"].items()
    ]
    rows.append(("continuous ranked probability score", f"{calibration['crps_ms']:.3f} ms"))
    return report.table(("", ""), rows, numbers="-n")


def _failures(failures: Mapping[str, Any]) -> Html:
    rows = []
    names = {
        "model": "model",
        "failure_rate": "training rates of both ends",
        "logistic": "logistic: source + destination",
        "logistic_by_day": "logistic: source + destination + destination on its day",
    }
    for key, name in names.items():
        auc, brier = failures[key]["auc"], failures[key]["brier"]
        rows.append((name, "-" if auc is None else f"{auc:.3f}", f"{brier:.5f}"))
    text = f"<p>{failures['n_failed']:,} of {failures['n']:,} measurements failed.</p>"
    return Html(text + report.table(("", "AUC", "Brier score"), rows, numbers="-nn"))


def _rankings(rankings: Mapping[str, Mapping[str, float] | None]) -> Html:
    ranked = {name: scores for name, scores in rankings.items() if scores is not None}
    if not ranked:
        return Html("<p>No source has enough destinations among the scored measurements.</p>")
    formats = {"top1_regret_ms": ".2f", "recall_at_1": ".3f", "recall_at_5": ".3f", "sources": ","}
    rows = [
        (name, *(format(scores[key], formats[key]) for key in formats))
        for name, scores in sorted(ranked.items(), key=lambda item: item[1]["top1_regret_ms"])
    ]
    headers = ("method", "top-1 regret, ms", "recall at 1", "recall at 5", "sources")
    return report.table(headers, rows, numbers="-nnnn")


def _divergence(divergence: Mapping[str, Any]) -> Html:
    names = {
        "half": "the other half of the measurements",
        "with_time": "the prediction at their times",
        "without_time": "the prediction at no time",
    }
    rows = [
        (text, *(f"{divergence[which][name]:.4f}" for which in ("kl", "wasserstein")))
        for name, text in names.items()
    ]
    text = (
        f"<p>Medians over {divergence['pairs']:,} pairs with {divergence['measurements']:,} "
        "measurements, of which one half is compared.</p>"
    )
    headers = ("from", "KL divergence, nats", "Wasserstein distance of log RTTs")
    return Html(text + report.table(headers, rows, numbers="-nn"))


def _field_orders(losses: Mapping[str, Mapping[str, float]]) -> Html:
    names = ("last", "first", "marginal", "constant")
    rows = [
        (field, f"{each['n']:,}", *(f"{each[name]:.3f}" for name in names))
        for field, each in losses.items()
    ]
    headers = ("nats a field", "n", "asked last", "asked first", "marginal", "best constant")
    return report.table(headers, rows, numbers="-nnnnn")


def _tokens(tokens: list[dict[str, Any]]) -> Html:
    rows = [
        (
            str(each["position"]),
            each["field"],
            each["actual"],
            f"{each['p_actual']:.1%}",
            each["predicted"],
            f"{each['p_predicted']:.1%}",
        )
        for each in tokens
    ]
    headers = ("position", "field", "actual", "probability", "expected", "probability")
    return report.table(headers, rows, numbers="n--n-n")


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> Html:
    names = list(next(iter(groups.values()))["methods"]) if groups else []
    rows = []
    for label, group in groups.items():
        cells = (f"{group['methods'][name]['median_rel']:.4f}" for name in names)
        rows.append((label, f"{group['n']:,}", *cells))
    return report.table(("median relative", "n", *names), rows, numbers="-n" + "n" * len(names))
