"""How well can my RIPE Atlas pings be foretold? From results as RIPE gives them to a report.

    python examples/ripe_atlas.py OUTPUT RESULTS.ndjson [RESULTS.bz2 ...]

RESULTS are what the API or a daily dump holds. The last tenth of the time is foretold from
what came before, by a model and by classical methods. Stopped, it goes
on where it was; all it makes is below OUTPUT.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ping_llm import evaluate, inspect_data, prepare_data, train


def main(output: str, *results: str, steps: int = 1500, settings: Sequence[str] = ()) -> Any:
    place = Path(output)
    place.mkdir(parents=True, exist_ok=True)
    prepare_data(results, output=place / "rows", split="time")
    inspect_data(place / "rows", report=place / "data.html")
    train(place / "rows", place / "run", preset="tiny", steps=steps, overrides=settings)
    result = evaluate(place / "run", place / "rows", report=place / "evaluation.html")
    for name, scores in result.methods.items():
        error, worst = scores["median_rel"], scores["p90_rel"]
        print(f"{name:14s} relative error: median {error:8.4f}, 90th percentile {worst:8.4f}")
    failures = result.failures
    print(f"{failures['n_failed']} of {failures['n']} failed; AUC {failures['model']['auc']}")
    print(f"see {place / 'data.html'} and {place / 'evaluation.html'}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
