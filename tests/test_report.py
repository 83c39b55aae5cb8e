import math
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.errors import StorageError
from ping_llm.report import Html, figure, loss_plot, markup, page, picture, span, table, write_page

PNG = b"\x89PNG\r\n\x1a\n"
FULL = [
    {"step": s, "loss": 5 / s, "valid_loss": None if s % 2 else 6 / s, "loss_rtt": 8 / s}
    for s in range(1, 60)
]


@pytest.mark.parametrize(
    "metrics",
    [
        FULL,
        [],
        [{"step": 1, "loss": 5.0}],
        [{"step": 1, "loss": math.nan, "valid_loss": math.inf}],
        [{"step": 1}, {"step": 2, "valid_loss": 3.0}],
    ],
    ids=["full", "nothing", "one", "not finite", "missing"],
)
def test_the_loss_plot_is_a_picture_whatever_the_metrics_lack(tmp_path, metrics):
    path = tmp_path / "loss.png"
    loss_plot(metrics, str(path))
    assert path.read_bytes().startswith(PNG)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_the_loss_plot_replaces_an_older_one(tmp_path):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    loss_plot(FULL, str(path))
    assert path.read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written") as caught:
        loss_plot(FULL, str(tmp_path / "file" / "loss.png"))
    assert "\n" not in str(caught.value)


HOSTILE = "</td><script>alert('x')</script>&\"'"


@given(text=st.text())
def test_text_enters_a_page_as_itself_and_never_as_markup(text):
    found = []

    class Reader(HTMLParser):
        def handle_data(self, data):
            found.append(data)

        def handle_starttag(self, tag, attrs):
            assert tag == "td"

    reader = Reader(convert_charrefs=True)
    reader.feed(f"<td>{markup(text)}</td>")
    reader.close()
    assert "".join(found) == text


@pytest.mark.parametrize(
    "made",
    [
        table((HOSTILE,), [(HOSTILE,)]),
        span(HOSTILE, HOSTILE),
        page(HOSTILE, [markup(HOSTILE)]),
    ],
    ids=["table", "span", "page"],
)
def test_builders_escape_what_is_not_markup(made):
    assert "<script" not in made
    assert "alert" in made


def test_markup_is_kept_as_it_is():
    assert table(("",), [(Html("<b>x</b>"),)]) == "<table><tr><td><b>x</b></td></tr></table>"
    assert markup(3) == "3"
    assert markup(Html("<i>")) == "<i>"


def test_numbers_stand_to_the_right():
    made = table(("a", "n"), [("x", 1)], numbers="-n")
    assert '<td>x</td><td class="number">1</td>' in made
    assert '<th>a</th><th class="number">n</th>' in made


def test_a_table_whose_rows_do_not_fit_its_headers_is_an_error():
    with pytest.raises(ValueError, match="longer"):
        table(("a", "b"), [("x",)])


def test_a_picture_is_inside_the_page_and_the_same_every_time():
    pictures = []
    for _ in range(2):
        fig, (ax,) = figure()
        ax.plot([1, 2], [3, 4])
        pictures.append(picture(fig, 'two "points"'))
    assert pictures[0].startswith(
        '<img alt="two &quot;points&quot;" src="data:image/svg+xml;base64,'
    )
    assert pictures[0] == pictures[1]


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "r.html"
    write_page("old", str(path))
    write_page("new \u2713", str(path))
    assert path.read_text(encoding="utf-8") == "new \u2713"
    with pytest.raises(StorageError, match="cannot be written"):
        write_page("x", str(path / "r.html"))
    assert [each.name for each in path.parent.iterdir()] == ["r.html"]
