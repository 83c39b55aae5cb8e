"""What `inspect-sae` found, as one HTML page."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ping_llm.report import COLOURS, Html, figure, log_axis, markup, page, picture, sortable, table
from ping_llm.sae.features import Association, FeatureStatistics
from ping_llm.sae.result import Context, FeatureReport, InspectSaeResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS_AT_MOST = 2000


def html_page(
    result: InspectSaeResult, statistics: FeatureStatistics, others: Sequence[FeatureReport]
) -> str:
    """Returns the page.

    Args:
        result: What was found.
        statistics: Of all features.
        others: The features that are not shown in full.
    """
    listed = [*result.features, *others][:ROWS_AT_MOST]
    left_out = len(result.features) + len(others) - len(listed)
    where = "held-out prompts" if result.held_out else "some prompts, not known to be held out"
    facts = [
        ("kind", result.architecture),
        ("features", f"{result.d_sae:,} of activations of width {result.d_in:,}"),
        ("explained variance", f"{result.explained_variance:.2%} on {where}"),
        ("active on a token", f"{result.l0:.1f}"),
        ("never active", f"{result.never_active:,} on {result.tokens:,} tokens"),
    ]
    blocks = [
        Html('<p class="quiet">as <code>ping-llm inspect-sae</code> sees it</p>'),
        table(("", ""), facts),
    ]
    if result.losses:
        headers = (
            "next token",
            "targets",
            "model",
            "autoencoder in it",
            "zeros in it",
            "recovered",
        )
        rows = [
            (
                name,
                f"{loss.targets:,}",
                f"{loss.model:.4f}",
                f"{loss.autoencoder:.4f}",
                f"{loss.zero:.4f}",
                "" if loss.recovered is None else f"{loss.recovered:.2%}",
            )
            for name, loss in result.losses.items()
        ]
        blocks += [
            Html("<h2>Loss with the autoencoder in the model</h2>"),
            table(headers, rows, numbers="-nnnnn"),
            Html('<p class="quiet">Cross-entropy in nats a token, on the same prompts.</p>'),
        ]
    blocks.append(picture(_density_figure(statistics), "how many features are how dense"))
    blocks += [Html("<h2>Features</h2>"), sortable(_feature_table(listed, len(result.features)))]
    if left_out:
        blocks.append(Html(f'<p class="quiet">... and {left_out:,} more, which rebuild less</p>'))
    if statistics.properties:
        blocks.append(
            Html(
                '<p class="quiet">Numbers below properties: what part of the entropy of "it is '
                'active" they explain, <em>share</em> for the place, the others within places. '
                "Percentages: how often the feature's tokens are of the category and, in "
                "brackets, how often any tokens in these places are.</p>"
            )
        )
    blocks.append(Html("<h2>Contexts</h2>"))
    for report in result.features:
        blocks += _feature_blocks(report)
    return page(f"Sparse autoencoder {result.sae}", blocks)


def _density_figure(statistics: FeatureStatistics) -> "Figure":
    fig, (left, right) = figure(columns=2, width=9.5, height=3.2)
    alive = statistics.counts > 0
    density = statistics.counts[alive] / max(statistics.tokens, 1)
    edges = np.geomspace(1 / max(statistics.tokens, 1), 1, 41)
    left.hist(density, bins=edges.tolist(), color=COLOURS[0])
    left.set(xlabel="part of the tokens it is active on", ylabel="features")
    right.plot(density, statistics.means[alive], ".", ms=3, color=COLOURS[1], alpha=0.6)
    right.set(xlabel="part of the tokens it is active on", ylabel="mean strength there")
    for axes in (left, right):
        log_axis(axes)
    return fig


def _feature_table(reports: Sequence[FeatureReport], detailed: int) -> Html:
    named = any(report.associations for report in reports)
    headers = ["feature", "density", "mean"]
    properties = sorted({each.property for r in reports for each in r.associations[1:]})
    if named:
        headers += ["place", "share", *properties, "goes with"]
    rows = []
    for index, report in enumerate(reports):
        number = f"#{report.feature}"
        link = Html(f'<a href="#f{report.feature}">{number}</a>') if index < detailed else number
        row: list[object] = [link, f"{report.density:.5f}"]
        row.append(f"{report.mean:.3g}")
        if named:
            place, best, *_ = report.associations
            shares = {each.property: f"{each.share:.3f}" for each in report.associations}
            row += [_category(place), f"{place.share:.3f}", *map(shares.get, properties)]
            row.append(f"{best.property} {_category(best)}")
        rows.append(row)
    return table(headers, rows, numbers="nnn-n" + "n" * len(properties) if named else "nnn")


def _category(each: Association) -> str:
    return f"{each.category} {each.within:.0%} ({each.base:.0%})"


def _feature_blocks(report: FeatureReport) -> list[Html]:
    title = f"#{report.feature}: active on {report.density:.3%} of the tokens"
    blocks = [Html(f'<h3 id="f{report.feature}">{markup(title)}</h3>')]
    if report.associations:
        parts = [f"{each.property}: {_category(each)}" for each in report.associations[:4]]
        blocks.append(Html(f"<p>{markup('; '.join(parts))}</p>"))
    if report.neighbours:
        alike = ", ".join(f"#{number} ({cosine:.2f})" for number, cosine in report.neighbours)
        blocks.append(Html(f'<p class="quiet">directions most alike: {markup(alike)}</p>'))
    return blocks + [_context_block(context, report.maximum) for context in report.contexts]


def _context_block(context: Context, maximum: float) -> Html:
    spans = []
    for index, (text, strength) in enumerate(zip(context.tokens, context.strengths, strict=True)):
        depth = min(strength / maximum, 1.0) if maximum else 0.0
        style = f"background:rgba(213,94,0,{0.1 + 0.6 * depth:.2f})" if strength > 0 else ""
        if index == context.strongest:
            style += ";outline:1px solid #D55E00"
        shown = markup(text.replace(" ", "\u00a0")) or Html("&empty;")
        attributes = f' style="{style}" title="{html.escape(f"{strength:.3f}")}"' if style else ""
        spans.append(f"<span{attributes}>{shown}</span>")
    caption = f"{context.sample}  {context.caption}".strip()
    return Html(
        f'<p class="quiet" style="margin:.5rem 0 0">{markup(caption)}</p>'
        f'<pre style="white-space:pre-wrap;margin:0">{" ".join(spans)}</pre>'
    )
