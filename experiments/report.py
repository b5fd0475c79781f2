"""Renders runs as one self-contained HTML page: training curves, results, plots, options and cost.

    python -m experiments.report runs/NAME
    python -m experiments.report runs/FIRST runs/SECOND --output comparison.html

The command reads the files of a run, which may still be training. For several runs, the page lists the options that
differ.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from experiments.shared import command_line, plots
from experiments.shared.command_line import DefaultInHelp
from experiments.table import compare, page
from maml_jax.runs.files import WorkdirError, read_json, write_file
from maml_jax.runs.forms import check_form
from maml_jax.runs.loggers import labels_and_numbers


@dataclasses.dataclass(frozen=True)
class Config:
    """The runs may still be training. For several runs, the page lists the options that differ."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")
    ]
    """Run directories, such as those in runs/ and results/."""
    output: DefaultInHelp[Path | None] = None
    """The HTML file. Default: report.html in the directory of the first run."""


FORMS: dict[str, Any] = {
    "run": {"config?": dict | None, "starts?": [compare.START]},
    "results": {
        "config?": dict | None,
        "made_by?": compare.START | {"finished?": str, "earlier_starts?": [compare.START]},
    },
}
"""Forms of `run.json` and `results.json`."""

ABSENT = ""
"""Shown for an option that a run does not have."""


class Run(NamedTuple):
    """Files of one run."""

    path: Path
    label: str
    """Name of the run on the page."""
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """Provenance of each start, from `maml_jax.runs.provenance`."""
    rows: list[dict[str, Any]]
    """Rows of `metrics.jsonl`; empty if the directory has no such file."""
    results: dict[str, Any] | None


def read_all(paths: Sequence[Path]) -> list[Run]:
    """Reads runs. Their labels are the names of their directories, or the paths if two names are equal."""
    runs = [read(path) for path in dict.fromkeys(paths)]
    names = [run.label for run in runs]
    return [run if names.count(run.label) == 1 else run._replace(label=str(run.path)) for run in runs]


def read(path: Path) -> Run:
    """Reads a run's directory.

    Raises:
      ValueError: if the directory holds no run.
      WorkdirError: if a file of the run is damaged.
    """
    files = {name: path / f"{name}.json" for name in ("run", "results")}
    found = {name: read_json(file) for name, file in files.items() if file.exists()}
    for name, content in found.items():
        check_form(files[name], content, FORMS[name])
    if not found:
        raise ValueError(f"{path} holds no run: run.json and results.json are missing.")
    results = found.get("results")
    made_by = (results or {}).get("made_by", {})
    run = found.get("run", {})
    starts = run.get("starts") or [*made_by.get("earlier_starts", []), made_by]
    config = run.get("config") or (results or {}).get("config") or {}
    return Run(path, path.resolve().name, config, starts, _rows(path / "metrics.jsonl"), results)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    if lines.pop():  # A running training may be writing its last line.
        print(f"{path}: the incomplete last line is left out.")
    try:
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f"{path} is damaged: {error}.") from error
    for row in rows:
        check_form(path, row, {"step?": float})
    return rows


def prepare(config: Config) -> tuple[list[Run], Path]:
    """Reads all runs.

    Raises:
      ValueError: if no run is given, a directory holds no run, or the folder of the page does not exist.
      WorkdirError: if a file of a run is damaged.
      OSError: if a file cannot be read.
    """
    if not config.runs:
        raise ValueError("runs must have at least one directory, but got none.")
    output = config.output or config.runs[0] / "report.html"
    runs = read_all(config.runs)
    if not output.parent.is_dir():
        raise ValueError(f"output must be in a directory that exists, but {output.parent} does not.")
    return runs, output


def main(prepared: tuple[list[Run], Path]) -> None:
    """Writes the page."""
    runs, output = prepared
    write_file(output, html(runs).encode("utf-8", "backslashreplace"))  # Paths may not be UTF-8.
    print(f"Wrote {output}.")


def html(runs: Sequence[Run]) -> str:
    """Returns the HTML page of the runs."""
    title = ", ".join(run.label for run in runs)
    parts = [page.head(title), f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        parts.append(f"<section><h2>Options that differ</h2>{_comparison(runs)}</section>")
    curves = training_curves(runs)
    if curves:
        target = io.BytesIO()
        plots.training(target, curves)
        parts.append(f"<section><h2>Training</h2>{page.image(target.getvalue(), 'metrics over meta-steps')}</section>")
    if tested := _tested(runs):
        target = io.BytesIO()
        plots.inner_steps(target, tested)
        picture = page.image(target.getvalue(), "accuracy over inner steps")
        parts.append(f"<section><h2>Accuracy over inner steps</h2>{picture}</section>")
    return "\n".join([*parts, *map(_section, runs), "</body></html>\n"])


def training_curves(runs: Sequence[Run]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Returns the steps and values of each line of each metric, `{metric: {line: (steps, values)}}`.

    A run with several trainings, such as methods and seeds, has a line for each training.
    """
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for run in runs:
        for row in run.rows:
            if not _is_training(row):
                continue
            labels, numbers = labels_and_numbers(row)
            name = ", ".join([*([run.label] if len(runs) > 1 or not labels else []), *labels])
            for metric, value in numbers.items():
                steps, values = curves.setdefault(metric, {}).setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _is_training(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("step"), (int, float))


def _tested(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    found = {}
    for run in runs:
        tested = (run.results or {}).get("test")
        for label, summary in tested.items() if isinstance(tested, Mapping) else ():
            if isinstance(summary, Mapping) and {"accuracy", "half_width"} <= summary.keys():
                check_form(run.path / "results.json", summary, {"accuracy": [float], "half_width": [float]})
                found[f"{run.label}, {label}"] = dict(summary)
    return found


def _section(run: Run) -> str:
    parts = [f"<section><h2>{escape(run.label)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in cost(run)]
    for path in sorted(run.path.glob("*.png")):
        parts.append(f"<h3>{escape(path.stem)}</h3>{page.image(path.read_bytes(), path.stem)}")
    options = "".join(f"<tr><td>{escape(key)}</td>{_value(value)}</tr>" for key, value in run.config.items())
    parts.append(f"<details><summary>Options</summary><table>{options}</table></details>")
    starts = escape(json.dumps(run.starts, indent=1))
    parts.append(f"<details><summary>Commands, versions, hardware</summary><pre>{starts}</pre></details>")
    return "\n".join([*parts, "</section>"])


def cost(run: Run) -> list[str]:
    """Describes the time, the meta-steps and the hardware of a run, a line of text for each."""
    last = run.starts[-1]
    finished = (run.results or {}).get("made_by", {}).get("finished")
    if finished and finished < last.get("started", ""):
        status, finished = "Running again. The results are those of an earlier start.", None
    else:
        status = "Finished." if finished else "Not finished."
    ends = [*(start.get("until") for start in run.starts[:-1]), finished]
    seconds = [_between(start["started"], end) for start, end in zip(run.starts, ends) if end and "started" in start]
    lines = [status]
    if seconds:
        lines[0] += f" {sum(seconds) / 3600:.2f} hours"
        lines[0] += f", in {len(run.starts)} starts." if len(run.starts) > 1 else "."
    if steps := max((row["step"] for row in run.rows if _is_training(row)), default=0):
        lines.append(f"{steps:,} meta-steps.")
    if "hardware" in last:
        lines.append(f"On {last['hardware']}, commit {last.get('commit')}.")
    return lines


def _between(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _comparison(runs: Sequence[Run]) -> str:
    """Returns a table of the options that differ, with a column for each run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    keys.pop("workdir", None)
    differing = [key for key in keys if len({json.dumps(run.config.get(key, ABSENT)) for run in runs}) > 1]
    head = "".join(f"<th>{escape(run.label)}</th>" for run in runs)
    body = ""
    for key in differing:
        body += f"<tr><td>{escape(key)}</td>{''.join(_value(run.config.get(key, ABSENT)) for run in runs)}</tr>"
    if not body:
        return "<p>All options are equal.</p>"
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _value(value: Any) -> str:
    return f"<td><code>{escape(value if isinstance(value, str) else json.dumps(value))}</code></td>"


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
