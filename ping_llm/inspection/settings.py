"""The settings of `ping-llm inspect-data`."""

from ping_llm.settings import Settings, field


class InspectDataSettings(Settings):
    """Show what a data set holds, and what is wrong with it.

    PATH is a directory of probe rows, or measurements in any format that `prepare-data` reads: a
    file, a directory or a glob, local or in an object store. Everything is read once, in bounded
    memory.
    """

    path: str = field(argument=True, location=True, metavar="PATH", help="What to inspect.")
    samples: int = field(default=0, ge=0, help="Show this many contexts, decoded.")
    report: str | None = field(default=None, location=True, help="Write an HTML page as well.")
