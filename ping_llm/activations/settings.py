"""The settings of `ping-llm inspect-activations`."""

from ping_llm.settings import Settings, field


class InspectActivationsSettings(Settings):
    """Show what an activation store holds, whether it is whole, and who is at work on it.

    With --verify the exit code is 1 if anything is damaged.
    """

    url: str = field(argument=True, location=True, help="The store.")
    verify: bool = field(default=False, help="Read every byte and compare checksums.")
    watch: bool = field(
        default=False,
        help="Watch the leases of workers for their whole length, to find those of dead workers.",
    )
