import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.text import safe, safe_html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jrow\r\n", r"\x1b[2Jrow\r\n"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("\ud800\x9b\x7f", r"\ud800\x9b\x7f"),
        ("\u2028", r"\u2028"),
        ("Zürich 東京 🙂", "Zürich 東京 🙂"),
        (b"\x1b", r"b'\x1b'"),
    ],
)
def test_what_a_terminal_would_obey_stands_as_an_escape(text, shown):
    assert safe(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_controls_a_terminal_or_breaks_a_line(text):
    shown = safe(text)
    assert not any(unicodedata.category(char)[0] == "C" for char in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert safe(shown) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_is_markup(text):
    shown = safe_html(text)
    assert not set("<>\"'") & set(shown)
    assert html.unescape(shown) == safe(text)
