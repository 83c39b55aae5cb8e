"""`ping-llm train`."""

from ping_llm.cli.options import settings_command
from ping_llm.training.settings import TrainSettings


@settings_command("train", TrainSettings)
def command(settings: TrainSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.training.loop import train

    result = train(settings)
    speed = f"{result.real_tokens_per_second:,.0f} real tokens/s"
    valid = "" if result.valid_loss is None else f"  valid {result.valid_loss:.4f}"
    mfu = "" if result.mfu is None else f"  MFU {result.mfu:.1%}"
    return result, (
        f"step {result.step}  loss {result.loss:.4f}{valid}  {speed}{mfu}  {result.output}"
    )
