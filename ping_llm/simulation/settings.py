"""The settings of `ping-llm simulate`."""

from ping_llm.errors import ConfigError
from ping_llm.settings import Settings, field

DAY = 86_400


class SimulateSettings(Settings):
    """Write the measurements of a synthetic internet.

    It has true geography, autonomous systems with prefixes, access technologies, load by the time
    of day, route changes, outages, IPv4 and IPv6. Addresses are private ones (10.0.0.0/8 and
    fd00::/16). The same settings give the same file; a finished one is left as it is.

    Attributes:
        output: A .parquet file; may be remote.
        probes: Hosts that measure; a quarter of them, at most 1,000, are targets too.
        days: Time span, from 2024-01-01 UTC.
        measurements: How many to write.
        seed: Another seed, another internet.
        events: JSON lines of the outages and route changes, to judge what finds them.
        no_events: Let nothing happen but load, noise and single losses.
    """

    output: str = field(location=True, stored=False)
    probes: int = field(default=400, ge=2, le=100_000)
    days: float = field(default=14.0, ge=1 / DAY, le=20_000)
    measurements: int = field(default=1_000_000, ge=1, le=10**12)
    seed: int = field(default=0, ge=0, lt=2**63)
    events: str | None = field(default=None, location=True, stored=False)
    no_events: bool = False

    def check(self) -> None:
        """Raises a `ConfigError` if the output is not named as Parquet."""
        if not self.output.endswith(".parquet"):
            raise ConfigError(f"output={self.output} must be a name that ends in .parquet")
        if self.no_events and self.events is not None:
            raise ConfigError("--no-events has no events to write; leave out --events")
