"""The settings of `ping-llm serve`."""

from ping_llm.errors import ConfigError
from ping_llm.settings import Settings, field


class ServeSettings(Settings):
    """Answer questions over HTTP, and show a page.

    It answers who knows the address that it prints, and writes nothing. Where --host is not this
    machine's own address (127.0.0.1, ::1, localhost), it starts only with a token in the
    environment variable PING_LLM_SERVE_TOKEN, which every request must carry.

    Attributes:
        run: Run directory of the model.
        pretrained: Serve the model in the box, which knows what --history tells, or a request.
        history: Measurements of the network, to be known beside what the run knows.
        data: Probe rows whose train measurements are known, likewise.
        places: CSV of prefix (or address), place, latitude and longitude, for a map of the world.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
    """

    run: str | None = field(default=None, location=True, positional=True)
    pretrained: bool = False
    history: str | None = field(default=None, location=True)
    data: str | None = field(default=None, location=True)
    places: str | None = field(default=None, location=True)
    host: str = "127.0.0.1"
    port: int = field(default=8400, ge=0, le=65535)

    def check(self) -> None:
        """Raises a `ConfigError` without one model, or with an empty host."""
        if (self.run is None) != self.pretrained:
            raise ConfigError("give either --run or --pretrained")
        if not self.host:
            raise ConfigError("host is empty; give an address such as 127.0.0.1")
