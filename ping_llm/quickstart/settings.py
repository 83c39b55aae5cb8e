"""The settings of `ping-llm quickstart`."""

from ping_llm.settings import Settings, field


class QuickstartSettings(Settings):
    """Run the whole story once, in minutes.

    Simulates an internet, turns its measurements into probe rows, inspects them, trains the model
    in the box further on them, compares both with classical methods and extracts activations. Run
    it again to continue where it stopped.

    Attributes:
        data: A file of your own measurements, instead of simulated ones.
        output: Directory for everything that is made.
        seed: Seed of the simulation, the splits and the model.
    """

    data: str | None = field(default=None, location=True)
    output: str = field(default="quickstart", location=True)
    seed: int = field(default=0, ge=0, lt=2**63)
