"""The settings of `ping-llm inspect-activations`."""

from ping_llm.settings import Settings, field


class InspectActivationsSettings(Settings):
    """Show what an activation store holds, whether it is whole, and who is at work on it.

    With --verify the exit code is 1 if anything is damaged.

    Attributes:
        url: The store.
        verify: Read every byte and compare checksums.
        watch: Watch the leases of workers for their whole length, to find those of dead workers.
    """

    url: str = field(argument=True, location=True)
    verify: bool = False
    watch: bool = False
