from ping_llm import progress


def test_a_plain_line_tells_amount_rate_and_time_left(monkeypatch):
    now = iter([0.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress("read", 200, "rows")
    shown.done, shown.note = 100, "a.parquet"
    assert shown.line() == "read: 100/200 (50%) rows  2.0/s  0:00:50 left  a.parquet"


def test_away_from_a_terminal_lines_are_rare_and_stdout_stays_clean(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress("count", total=1000, unit="things") as shown:
        for _ in range(1000):
            clock[0] += 0.025
            shown.update(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2  # 25 s, a line every 10 s


def test_work_of_unknown_size_has_no_time_left(monkeypatch):
    now = iter([0.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress("read", None, "B")
    shown.done = 10
    assert shown.line() == "read: 10 B  5.0/s"


def test_what_was_done_before_does_not_count_in_the_rate(monkeypatch):
    now = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress("train", 400, "steps", initial=200)
    shown.done = 210
    assert shown.line() == "train: 210/400 (52%) steps  1.0/s  0:03:10 left"
