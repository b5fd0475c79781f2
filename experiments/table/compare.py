"""Runs set beside the rows of the table: what each gave, how it differs from the others, and what is still missing."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.table.rows import DATA, METHODS, PUBLISHED, ROWS, SETTINGS, Published, Row, row_of
from maml_jax import evaluation
from maml_jax.evaluation import Difference, Protocol

TOGETHER, ONE_BY_ONE, NEAREST, ENSEMBLE = "queries together", "queries one by one", "nearest neighbour", "ensemble"


class Run(NamedTuple):
    """One training, finished or not."""

    path: Path
    row: Row | None
    """None if its options are of no row."""
    seed: int
    trained: int
    """Meta-steps done."""
    results: dict[str, Any] | None
    """Content of `results.json`; None before the first evaluation."""

    @property
    def steps(self) -> int:
        """Meta-steps of the schedule that the results are of."""
        return self.results["config"]["steps"] if self.results else 0

    def cost(self, label: str = "") -> str:
        """Hours, hardware, commit and day of the results, and which model those of that label are of."""
        assert self.results is not None
        made_by, selected = self.results["made_by"], self.results["selected"]
        earlier = made_by.get("earlier_starts", [])
        times = [(each.get("started"), each.get("until")) for each in earlier]
        times.append((made_by.get("started"), made_by["finished"]))
        if all(start and end for start, end in times):
            took = [datetime.fromisoformat(end) - datetime.fromisoformat(start) for start, end in times]
            seconds = sum(each.total_seconds() for each in took)
            hours = f"{seconds / 3600:.2f} hours" + (f" in {len(times)} starts" if earlier else "")
        else:
            hours = "time not recorded"
        # Of all its starts: a run may have gone on elsewhere.
        hardware, commits = (", then ".join(dict.fromkeys(str(each.get(key)) for each in (*earlier, made_by)))
                             for key in ("hardware", "commit"))  # fmt: skip
        model = "the best models together" if label == ENSEMBLE else f"the model of meta-step {selected['step']:,}"
        return f"{hours}, {hardware}, commit {commits}, {made_by['finished'][:10]}; {model}, selected: {selected['by']}"


def read(path: Path) -> Run | None:
    """The run in a directory; None if it holds none of few-shot classification.

    Raises:
      ValueError: if its `results.json` is damaged.
    """
    trained = _trained(path / "metrics.jsonl")
    if (path / "results.json").exists():
        try:
            results = json.loads((path / "results.json").read_text())
            if "experiment" not in results:
                return None
            config = results["config"]
            return Run(path, row_of(results), config["seed"], max(trained, config["steps"]), results)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / 'results.json'} is damaged: {error!r}. Restore it, or move it away.") from error
    named = re.fullmatch(r"(.+)-seed(\d+)", path.name)
    row = next((row for row in ROWS if named and row.name == named[1]), None)
    if named is None or row is None or not (path / "metrics.jsonl").exists():
        return None
    return Run(path, row, int(named[2]), trained, None)


def find(folders: Iterable[Path]) -> list[Run]:
    """The runs that the folders are or hold, by path."""
    found = []
    for folder in folders:
        alone = (folder / "results.json").exists() or (folder / "metrics.jsonl").exists()
        for path in [folder] if alone else sorted(path for path in folder.iterdir() if path.is_dir()):
            found += [run] if (run := read(path)) else []
    return found


def _trained(metrics: Path) -> int:
    """The last step in `metrics.jsonl`, whose last line may be cut."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def labels(row: Row, seen: Literal["together", "both"] = "both") -> tuple[str, ...]:
    """Of the evaluations of a row's run: the queries are apart only where they see each other."""
    both = seen == "both" and row.options.get("normalisation", "batch") == "batch"
    apart, ensemble = (ONE_BY_ONE,) * both, (ENSEMBLE,) * row.options.get("ensemble", False)
    return (TOGETHER, *apart, *ensemble)


class Number(NamedTuple):
    """A measured accuracy and the half width of its 95% interval over tasks, in per cent."""

    accuracy: float
    half_width: float
    inner_steps: int
    seed: int
    protocol: str


class Line(NamedTuple):
    """What one row gave with one schedule on one data set: a number for each seed."""

    row: Row
    label: str
    """Of the evaluation in `results.json`."""
    runs: list[Run]
    """Evaluated, of as many meta-steps each; none if the row has no result yet."""
    trained: int
    """Meta-steps done by any run of the row."""

    @property
    def method(self) -> str:
        return NEAREST if self.label == NEAREST else self.row.method

    @property
    def title(self) -> str:
        return METHODS[self.method] + (", ensemble" if self.label == ENSEMBLE else "")

    @property
    def steps(self) -> int:
        return self.runs[0].steps if self.runs else 0

    @property
    def data(self) -> str:
        """Name of the data set that was evaluated on."""
        return _data(self.runs[0])

    @property
    def published(self) -> Published | None:
        return PUBLISHED.get((self.row.data, self.row.setting), {}).get(self.method)

    @property
    def inner_steps(self) -> int:
        return 0 if self.label == NEAREST else self.row.inner_steps

    def summaries(self, label: str | None = None) -> Iterator[tuple[Run, dict[str, Any]]]:
        for run in self.runs:
            test = (run.results or {})["test"]
            if (label or self.label) in test:
                yield run, test[label or self.label]

    def numbers(self, label: str | None = None) -> list[Number]:
        """By seed, of this evaluation or another."""
        at = self.inner_steps
        return [
            Number(found["accuracy"][at], found["half_width"][at], at, run.seed, str(Protocol(**found["protocol"])))
            for run, found in self.summaries(label)
        ]

    def apart(self) -> list[Number]:
        """Those with the queries one by one; the same ones where queries do not see each other anyway."""
        if self.label in (NEAREST, ENSEMBLE):
            return []
        return self.numbers(ONE_BY_ONE if ONE_BY_ONE in labels(self.row) else TOGETHER)

    def curve(self) -> dict[str, list[float]]:
        """Accuracy after each number of inner steps, mean over seeds, and the half width of its interval."""
        both = [[found[name] for _, found in self.summaries()] for name in ("accuracy", "half_width")]
        mean, half_width = (np.asarray(each, np.float64) for each in both)
        return {
            "accuracy": mean.mean(0).tolist(),
            "half_width": (np.sqrt(np.square(half_width).sum(0)) / len(half_width)).tolist(),
        }


class Paired(NamedTuple):
    """A line against another, on the same tasks."""

    first: Line
    second: Line
    seed: int
    difference: Difference


class Group(NamedTuple):
    """All lines of one data set and setting, with what others have published for it."""

    title: str
    lines: list[Line]
    """At least one of each row."""
    paired: list[Paired]
    others: dict[str, Published]
    """Published of methods which have no line here."""


def group(rows: Sequence[Row], runs: Sequence[Run]) -> list[Group]:
    """Rows, and those that runs are of, by data set and setting."""
    shown = [row for row in ROWS if row in rows or any(run.row is row for run in runs)]
    groups = []
    for key in dict.fromkeys((row.data, row.setting) for row in shown):
        members = [row for row in shown if (row.data, row.setting) == key]
        lines = [line for row in members for line in _lines(row, runs)]
        names = sorted({line.data for line in lines if line.runs}) if key[0] == "images" else []
        title = f"{', '.join(names) or DATA[key[0]]}, {SETTINGS[key[1]]}"
        present = {line.method for line in lines}
        published = PUBLISHED.get(key, {})
        others = {name: published[name] for name in METHODS if name in published and name not in present}
        groups.append(Group(title, lines, list(_paired(lines)), others))
    return groups


def _lines(row: Row, runs: Sequence[Run]) -> Iterator[Line]:
    """Runs of the same data and schedule are one line; the longest schedule first."""
    trained = max((run.trained for run in runs if run.row is row), default=0)
    done = [run for run in runs if run.row is row and run.results]
    if not done:
        yield Line(row, TOGETHER, [], trained)
    for data, steps in sorted({(_data(run), run.steps) for run in done}, key=lambda key: (-key[1], key[0])):
        same = _one_a_seed([run for run in done if (_data(run), run.steps) == (data, steps)])
        yield Line(row, TOGETHER, same, trained)
        for label in (ENSEMBLE, NEAREST):
            if having := [run for run in same if label in (run.results or {})["test"]]:
                yield Line(row, label, having, trained)


def _one_a_seed(runs: Sequence[Run]) -> list[Run]:
    """A run may be there twice, such as below `runs/` and, committed, below `results/`: of each seed the latest."""
    latest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.results or {})["made_by"]["finished"]):
        latest[run.seed] = run
    return [latest[seed] for seed in sorted(latest)]


def _data(run: Run) -> str:
    return (run.results or {})["test"][TOGETHER]["protocol"]["data"]


def _paired(lines: Sequence[Line]) -> Iterator[Paired]:
    """Second-order MAML against every other line of the same schedule, where the tasks were the same.

    A row that there is no such line of is set, with its longest, against the longest.
    """
    done = [line for line in lines if line.runs]
    mine = [line for line in done if line.method == "maml" and line.label == TOGETHER]
    others = [line for line in done if line.title not in {line.title for line in mine}]
    paired = set()
    for first in mine:
        for second in others:
            if second.steps == first.steps:
                for pair in _on_the_same_tasks(first, second):
                    paired.add((second.data, second.title))
                    yield pair
    by_length = sorted(done, key=lambda line: line.steps)
    longest = {(line.data, line.title): line for line in by_length}
    first_of = {line.data: line for line in by_length if line in mine}
    for (data, title), second in longest.items():
        if data in first_of and second in others and (data, title) not in paired:
            yield from _on_the_same_tasks(first_of[data], second)


def _on_the_same_tasks(first: Line, second: Line) -> Iterator[Paired]:
    for run, ours in first.summaries():
        for other, theirs in second.summaries():
            known = "correct" in ours and "correct" in theirs
            if known and Protocol(**ours["protocol"]).same_tasks(Protocol(**theirs["protocol"])):
                difference = evaluation.difference(
                    evaluation.from_summary(ours),
                    evaluation.from_summary(theirs),
                    steps=(first.inner_steps, second.inner_steps),
                )
                yield Paired(first, second, run.seed, difference)
