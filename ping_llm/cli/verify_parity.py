"""`ping-llm verify-parity`."""

import dataclasses

import click

from ping_llm.cli.options import common_options, print_result


@click.command("verify-parity")
@click.option("--model", required=True, help="Checkpoint directory or hub id.")
@click.option("--layers", default="all", show_default=True, help="all, or such as 0,5; -1: last.")
@click.option(
    "--sites",
    default="residual,attn,mlp,embed,final_norm",
    show_default=True,
    help="Which sites, with commas.",
)
@common_options
def command(model: str, layers: str, sites: str, as_json: bool) -> None:
    """Compare a checkpoint's activations with those of transformers.

    In float32, on prompts of random token ids, packed and alone. Needs the extra [parity].
    """
    from ping_llm.extraction.parity import verify_parity

    result = verify_parity(model, layers=layers, sites=sites)
    lines = [f"{name:>16}  {value:.1e}" for name, value in result.by_site.items()]
    lines.append(f"largest relative L2 {result.max_relative_l2:.1e} over {result.tokens} tokens")
    print_result(dataclasses.asdict(result), as_json=as_json, text="\n".join(lines))
