"""`ping-llm predict`."""

from pathlib import Path
from typing import Any

import click

from ping_llm.cli.options import common_options, print_result

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("predict")
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Run directory of the model."
)
@click.option("--src", metavar="A", help="Source address.")
@click.option("--dst", metavar="B", help="Destination address.")
@click.option("--time", metavar="T", help="When: ISO 8601 or seconds since 1970, UTC.")
@click.option("--pairs", type=_FILE, help="Parquet or CSV with src_addr, dst_addr[, event_time].")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Parquet for --pairs."
)
@click.option("--rank", type=_FILE, help="Destinations, one address a line, to put in order.")
@click.option("--history", type=_FILE, help="Measurements of the source, to be read first.")
@common_options
def command(as_json: bool, **arguments: Any) -> None:
    """Predict RTT distributions and failures.

    Give --src and --dst for one pair; --pairs and --output for a file of pairs, which goes on where
    it was stopped; --src and --rank to order many destinations by expected RTT.
    """
    from ping_llm.prediction.predict import predict

    result = predict(**arguments)
    if "ranked" in result:
        text = "\n".join(_line(each) for each in result["ranked"])
    elif "rtt_ms" in result:
        text = _line(result)
    else:
        rate = result["pairs_per_second"]
        speed = "" if rate is None else f"  {rate:,.0f} pairs/s"
        text = f"{result['pairs']:,} pairs{speed}  {result['output']}"
    print_result(result, as_json=as_json, text=text)


def _line(answer: dict[str, Any]) -> str:
    rtt = answer["rtt_ms"]
    text = (
        f"{answer['src']} -> {answer['dst']}  {rtt['p50']:.2f} ms"
        f"  (50 %: {rtt['p25']:.2f} to {rtt['p75']:.2f}, 90 %: {rtt['p5']:.2f} to {rtt['p95']:.2f},"
        f" mean {rtt['mean']:.2f})  fails {answer['p_failed']:.1%}"
    )
    if answer["unseen"]:
        text += f"  [not in training: {', '.join(answer['unseen'])}]"
    return text
