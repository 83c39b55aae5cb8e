"""The settings of `ping-llm quickstart`."""

from ping_llm.settings import Settings, field


class QuickstartSettings(Settings):
    """Run the whole story once on simulated data, in minutes.

    Simulates an internet, turns its measurements into probe rows, inspects them, trains a small
    decoder, compares it with classical methods and extracts its activations. Run it again to
    continue where it stopped.

    Attributes:
        output: Directory for everything that is made.
        seed: Seed of the simulation, the splits and the model.
    """

    output: str = field(default="quickstart", location=True)
    seed: int = field(default=0, ge=0, lt=2**63)
