"""The page shows everything that a run recorded, needs no other file, and names missing parts."""

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.commands import launch

from experiments import report
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of different lengths, of two seeds each, with a picture."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("short", 200), ("long", 400)):
        run = RunDirectory(folder / name, name, {"steps": steps, "seeds": [0, 1]})
        for seed in (0, 1):
            for step in range(50, steps + 1, 50):
                run.log(method="maml", seed=seed, step=step, loss=(1 + seed) / step)
        run.write_results({"rows": []})
        report.plots.training(run.path / "curves.png", {"loss": {"a": ([1, 2], [2.0, 1.0])}})
        run.close()
    return folder


def test_report_end_to_end(runs):
    done = launch("experiments.report", "short", "long", "--output", "page.html", cwd=runs)
    assert done.returncode == 0, done.stderr
    page = (runs / "page.html").read_text()
    assert not re.search(r"(src|href)=.(?!data:)", page)  # The page opens without a network.
    assert re.search(r"<td>steps</td><td><code>200</code></td><td><code>400</code></td>", page)
    assert "<td>seeds</td>" not in page.split("Training")[0]  # The runs do not differ in this option.
    for name in ("short", "long"):
        assert page.count(f"<h2>{name}</h2>") == 1
    assert len(re.findall("data:image/png;base64,", page)) == 1 + 2 * len(list((runs / "short").glob("*.png")))


REPORT_SIZES = """<script>addEventListener("load", () => {
  document.title = JSON.stringify([...document.images].map(image => [image.complete, image.naturalWidth]));
});</script>"""


def test_a_browser_shows_all_plots_without_errors(runs, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("There is no chromium to open the page with.")
    html = report.html([report.read(runs / name) for name in ("short", "long")])
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"{REPORT_SIZES}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
               "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ":CONSOLE" not in done.stderr, done.stderr
    shown = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert len(shown) == html.count("<img ") == 3
    assert all(complete and width > 100 for complete, width in shown)


def test_curves_are_the_metrics(runs):
    (run,) = [report.read(runs / "short")]
    curves = report.training_curves([run])
    rows = [json.loads(line) for line in (runs / "short" / "metrics.jsonl").read_text().splitlines()]
    for seed in (0, 1):
        expected = [(row["step"], row["loss"]) for row in rows if row["seed"] == seed]
        (line,) = [line for name, line in curves["loss"].items() if name.endswith(f"seed {seed}")]
        np.testing.assert_array_equal(np.transpose(line), expected)
    # With a second run, the name of each line starts with the name of its run.
    both = report.training_curves([run, report.read(runs / "long")])
    assert {name.split(",")[0] for name in both["loss"]} == {"short", "long"}


def test_the_picture_shows_every_line(monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure))
    lines = {"first": ([1, 2, 3], [3.0, 2.0, 1.0]), "second": ([1, 2], [5.0, 4.0])}
    report.plots.training(io.BytesIO(), {"loss": lines, "accuracy": {"second": ([2], [0.5])}})
    loss, accuracy = drawn[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3, 2, 1], [5, 4]]
    assert accuracy.lines[0].get_color() == loss.lines[1].get_color()
    monkeypatch.undo()
    plt.close("all")


def test_a_run_that_is_still_training(runs, tmp_path, capsys):
    """The run has no results, and the last line of its metrics is incomplete."""
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs / "short" / name).read_bytes())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10')
    run = report.read(tmp_path)
    assert run.results is None and len(run.rows) == len(report.read(runs / "short").rows)
    assert "the incomplete last line is left out" in capsys.readouterr().out
    assert "Not finished." in report.html([run])


def test_accuracy_over_inner_steps_and_cost(tmp_path):
    made_by = {
        "started": "2026-01-01T10:00:00Z",
        "finished": "2026-01-01T13:00:00Z",
        "hardware": "abacus",
        "commit": "c",
    }
    made_by["earlier_starts"] = [{"started": "2026-01-01T08:00:00Z", "until": "2026-01-01T09:30:00Z"}]
    summary = {"accuracy": [20.0, 90.0], "half_width": [1.0, 2.0]}
    content = {"made_by": made_by, "config": {"ways": 5}, "test": {"transductive": summary}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    run = report.read(tmp_path)
    assert report.cost(run) == ["Finished. 4.50 hours, in 2 starts.", "On abacus, commit c."]
    page = report.html([run, run._replace(config={"shots": None, "workdir": "elsewhere"})])
    assert "Accuracy over inner steps" in page
    assert "<td>ways</td><td><code>5</code></td><td><code></code></td>" in page
    assert "<td>shots</td><td><code></code></td><td><code>null</code></td>" in page
    assert "<td>workdir</td>" not in page.split("<h2>Accuracy")[0]


def test_names_and_options_are_text(tmp_path):
    """Names are not read as HTML or formulas. Runs of equal names show their paths. Rows without a step are skipped."""
    paths = [tmp_path / folder / "<b>$x$" for folder in ("first", "second")]
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        (path / "run.json").write_text(
            json.dumps({"name": "x", "config": {"<i>": f"<script>{number}"}, "starts": [{}]})
        )
        (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"loss": 3.0}\n{"round": 1}\n')
    runs = report.read_all(paths)
    assert report.training_curves(runs)["loss"] == {str(path): ([1], [2.0]) for path in paths}
    page = report.html(runs)
    assert not {"<b>", "<i>", "<script>"} & set(re.findall("<[^>]*>", page.split("<body>")[1]))
    for row, message in (("[]", "the content must be an object"), ('{"step": null}', "step must be a number")):
        (paths[0] / "metrics.jsonl").write_text(f"{row}\n")
        with pytest.raises(WorkdirError, match=f"metrics.jsonl has another form: {message}"):
            report.read_all(paths)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"made_by": {"finished": 5}}, "made_by.finished must be a text, but is 5"),
        ({"made_by": {"earlier_starts": [{"until": []}]}}, r"earlier_starts\[0\].until must be a text or null"),
        ({"config": []}, "config must be an object or null"),
        ({"test": {"mine": {"accuracy": ["high"], "half_width": [0.0]}}}, r"accuracy\[0\] must be a number"),
    ],
)
def test_results_of_another_form_are_named(tmp_path, results, message):
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(WorkdirError, match=rf"results.json has another form: .*{message}"):
        report.html(report.read_all([tmp_path]))


def test_a_finished_run_that_is_training_again():
    run = report.Run(
        Path("x"), "x", {}, [{"started": "2026-01-01T08:00:00Z", "until": "2026-01-01T09:00:00Z"}], [], None
    )
    run = run._replace(results={"made_by": {"finished": "2026-01-01T09:00:00Z"}})
    assert report.cost(run) == ["Finished. 1.00 hours."]
    again = run._replace(starts=[*run.starts, {"started": "2026-01-02T08:00:00Z"}])
    assert report.cost(again)[0].startswith("Running again") and "1.00 hours" in report.cost(again)[0]


@pytest.mark.parametrize(
    "content, message",
    [(None, "holds no run: run.json and results.json are missing"), ("{", "run.json cannot be read")],
)
def test_a_directory_without_a_readable_run_raises(content, message, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    done = launch("experiments.report", str(tmp_path))
    assert done.returncode == 2 and message in done.stderr and str(tmp_path) in done.stderr
    assert not (tmp_path / "report.html").exists()
