"""Text that comes from files, made safe to show."""

import html
import unicodedata


def safe(text: object) -> str:
    r"""Returns `text` on one line, for a terminal: what it does not print stands as an escape.

    Control and format characters, line breaks, lone surrogates and unassigned code points become
    `\n`, `\x1b`, `\u202e` and the like; every other character stays as it is.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else char
        for char in str(text)
    )


def safe_html(text: object) -> str:
    """Returns `safe(text)` for HTML, in an element or a quoted attribute: markup is escaped too."""
    return html.escape(safe(text))
