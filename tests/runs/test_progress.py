"""Progress lines of a run that does not write to a terminal."""

from maml_jax.runs.progress import Progress


def test_lines_show_rate_and_remaining_time(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    progress = Progress(1000, "run", every=15)
    for step in (100, 200, 300, 400, 1000):
        progress.update(step, loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: 200/1,000 steps, 10.0 a second, 0:01:20 left, loss 0.25"
    assert lines[1] == "run: 400/1,000 steps, 10.0 a second, 0:01:00 left, loss 0.25"
    assert lines[-1].startswith("run: 1,000/1,000 steps")


def test_the_first_line_has_no_rate_before_two_calls(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    Progress(1000, "run", every=15).update(100, loss=0.25)
    assert capsys.readouterr().out == "run: 100/1,000 steps, loss 0.25\n"
