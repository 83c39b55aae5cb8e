"""The settings of `ping-llm inspect-data`."""

from ping_llm.settings import Settings, field


class InspectDataSettings(Settings):
    """Show what a data set holds, and what is wrong with it.

    PATH is a directory of probe rows, or measurements in any format that `prepare-data` reads: a
    file, a directory or a glob, local or in an object store. Everything is read once, in bounded
    memory.

    Attributes:
        path: What to inspect.
        samples: Show this many contexts, decoded.
        report: Write an HTML page as well.
        verify: First compare all files of probe rows with their checksums; a difference is an
            error. Other commands do so for splits of at most 32 MB, each time they open one.
        prefixes: Who is where: CSV with the columns prefix and some of asn, country, place,
            latitude, longitude; or pyasn's text.
    """

    path: str = field(argument=True, location=True, metavar="PATH")
    samples: int = field(default=0, ge=0)
    report: str | None = field(default=None, location=True)
    verify: bool = False
    prefixes: str | None = field(default=None, location=True)
