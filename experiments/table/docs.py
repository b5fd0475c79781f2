"""Writes the tables of README.md and docs/ from results/.

    python -m experiments.table.docs

A table stands in a page between the comments `<!-- NAME: begin -->` and `<!-- NAME: end -->`; `REGIONS` lists the
names.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reinforcement.evaluation import mean_by_task
from experiments.shared import command_line
from experiments.table import compare, page, returns
from experiments.table.compare import Group, Line
from experiments.table.page import table
from experiments.table.rows import PUBLISHED, Published
from maml_jax.evaluation import interval
from maml_jax.runs.files import read_json

PAGES = ("README.md", "docs/results.md", "docs/performance.md")
WORKLOADS = {
    "sinusoid": "Sinusoid",
    "omniglot-5w1s": "Omniglot 5-way 1-shot",
    "omniglot-20w1s": "Omniglot 20-way 1-shot",
    "miniimagenet-5w1s": "MiniImagenet shape, 5-way 1-shot",
    "transformer": "Transformer",
}
PROBLEMS = {"navigation": "2D navigation", "half-cheetah-velocity": "Half-cheetah", "ant-velocity": "Ant"}
PUBLISHED_STEPS = {5: 3, 20: 5}
"""Inner steps of the paper's accuracies on Omniglot, by the ways of a task."""
PAPER_STEPS = {
    "navigation": 100,
    "half-cheetah-velocity": 475,
    "half-cheetah-direction": 100,
    "ant-velocity": 375,
    "ant-direction": 575,
}
"""Number of meta-iterations in the paper's figures."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the tables of README.md and docs/."""

    results: Path = Path("results")
    """Folder of run directories, each with a results.json."""
    root: Path = Path(".")
    """Folder of README.md and docs/."""


def render(text: str, results: Path) -> str:
    """Returns the text of a page with new contents in all regions.

    Raises:
      ValueError: if a region of the page has an unknown name or no end.
    """
    names = re.findall(r"<!-- ([\w -]+): begin -->", text)
    for name in names:
        if name not in REGIONS:
            raise ValueError(f"There is no region {name!r}; the regions are {', '.join(REGIONS)}.")
        content = f"\n{REGIONS[name](results).strip()}\n\n"
        text = page.with_region(text, content, f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->")
    return text


# Ours beside the paper


def paper(results: Path) -> str:
    """Our results beside the paper's, one row for each experiment of the paper."""
    rows = [_sine_row(results)]
    for group in groups(results):
        for line in [line for line in group.lines if line.row.method == "maml" and line.runs][:1]:
            if line.published is not None:
                ours, theirs = page.over_seeds(line.numbers()), page.interval(line.published)
                rows.append([group.title, "accuracy, %", ours, theirs, _meta_steps(line)])
    for folder in FAST:
        found = read_json(results / folder / "results.json")
        test, config = found["test"][compare.TRANSDUCTIVE], found["config"]
        step = PUBLISHED_STEPS[config["ways"]]
        ours = f"{test['accuracy'][step]:.2f} ± {test['half_width'][step]:.2f}"
        training = f"fast recipe, {_fast_minutes(results, found)} minutes of one core"
        rows.append([_setting(found), "accuracy, %", ours, page.interval(_paper_accuracy(found)), training])
    # With the paper's inner loss; the longest training comes first.
    runs = [run for run in returns.found(results) if run.method == "maml"]
    runs = [run for run in runs if run.results["config"]["inner_loss"] == "logp"]
    for environment, title in returns.TITLES.items():
        for run in [run for run in runs if run.environment == environment][:1]:
            others = PAPER_STEPS[environment]
            training = f"{run.steps} meta-iterations" + ("" if others == run.steps else f" (paper: {others})")
            theirs = f"{run.results['paper']['maml'][1]:g}"
            rows.append([title, "return after 1 step", _return(run, 1), theirs, training])
    return table(("experiment", "measure", "ours", "paper", "training"), rows)


def _sine_row(results: Path) -> list[str]:
    found = read_json(results / "sinusoid-5-seeds" / "results.json")
    rows = [row for row in found["rows"] if (row["method"], row["shots"]) == ("maml", 5)]
    steps = f"{found['config']['steps']:,} meta-steps, {len(rows)} seeds"
    return ["Sine curves, 5 points", "squared error after 1 step", f"{np.median([row['mean'][1] for row in rows]):.3f}",
            f"{found['paper']['maml'][0]:g}", steps]  # fmt: skip


def _meta_steps(line: Line) -> str:
    full = line.row.steps
    return f"{line.steps:,} meta-steps" if line.steps >= full else f"{line.steps:,} of {full:,} meta-steps"


def _return(line: returns.Line, step: int) -> str:
    """Mean return after some gradient steps, over the seeds."""
    found = [row["return"][step] for row in line.rows]
    if len(found) == 1:
        return f"{found[0]:.1f} ± {line.rows[0]['half_width'][step]:.1f}"
    return f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f}, {len(found)} seeds)"


# Sine curves

SINE_STEPS = (1, 5, 10)


def sine_curves(results: Path) -> str:
    """Errors after 1, 5 and 10 steps from 5 points."""
    errors = read_json(results / "sinusoid-5-seeds" / "results.json")["paper"]["maml"]
    rows = [["paper", *(f"{error:g}" for error in errors), ""]]
    for folder, method, title in (
        ("sinusoid-5-seeds", "maml", "the paper's recipe"),
        ("sinusoid-steady-5-seeds", "steady", "the `steady` recipe"),
    ):
        found = read_json(results / folder / "results.json")["rows"]
        found = [row for row in found if (row["method"], row["shots"]) == (method, 5)]
        rates = [row["divergence"][10] for row in found]
        diverged = f"{min(rates):.1%} to {max(rates):.1%}"
        means = [np.median([_number(row["mean"], step) for row in found]) for step in SINE_STEPS]
        rows.append([f"{title}, mean over curves", *map(_error, means), diverged])
        # A run writes null for a median that was not recorded, and for a mean that is infinite.
        medians = [[row["median"][step] for row in found] for step in SINE_STEPS]
        cells = ["" if None in values else _error(np.median(values)) for values in medians]
        rows.append([f"{title}, median over curves", *cells, ""])
        worst = max(found, key=lambda row: _number(row["mean"], 1))
        rows.append([f"{title}, worst seed", *(_error(_number(worst["mean"], step)) for step in SINE_STEPS), ""])
    return table(("", "1 step", "5 steps", "10 steps", "diverged curves, by seed"), rows)


def _number(values: Sequence[float | None], step: int) -> float:
    value = values[step]
    return np.inf if value is None else value


def _error(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "not finite"


# Few-shot classification


@cache
def groups(results: Path) -> list[Group]:
    """The lines of all few-shot runs, by data set and setting."""
    return compare.group([], compare.find([results]))


def few_shot(results: Path) -> str:
    """All methods of each setting, and differences on the same tasks."""
    return page.accuracies(groups(results))


def protocols(results: Path) -> str:
    """Tasks of the accuracies of each setting."""
    return page.protocols(groups(results))


def runs(results: Path) -> str:
    """Provenance of each accuracy."""
    return page.provenance(groups(results))


FAST_START = "omniglot-20w1s-fast-200"
"""The run of the fast recipe from which the runs of its second phase start."""
FAST = ("omniglot-5w1s-fast", "omniglot-5w5s-fast", "omniglot-20w1s-fast", "omniglot-20w5s-fast")


def fast_recipe(results: Path) -> str:
    """Accuracies of the fast recipe after its second phase, with the time of both phases."""
    rows = []
    for folder in FAST:
        found = read_json(results / folder / "results.json")
        test = found["test"][compare.TRANSDUCTIVE]
        cells = [f"{test['accuracy'][step]:.2f} ± {test['half_width'][step]:.2f}" for step in (1, 3, 5, 10)]
        rows.append(
            [
                _setting(found),
                *cells,
                page.interval(_paper_accuracy(found)),
                _fast_minutes(results, found),
                f"`{folder}`",
            ]
        )
    head = ("setting", "1 step", "3 steps", "5 steps", "10 steps", "paper", "minutes of one core", "run")
    return table(head, rows)


def recipe_probes(results: Path) -> str:
    """Validation accuracies of short trainings with other choices of the recipe."""
    found = read_json(results / "recipe-probes" / "probes.json")["rows"]
    rows = [[row["choice"], f"{row['meta_steps']:,}", f"{row['validation']:.1f}"] for row in found]
    return table(("choice", "meta-steps", "validation, %"), rows)


def _setting(found: dict[str, Any]) -> str:
    return f"Omniglot, {found['config']['ways']}-way {found['config']['shots']}-shot"


def _paper_accuracy(found: dict[str, Any]) -> Published:
    """The accuracy of the paper's MAML in the setting of a run."""
    config = found["config"]
    return PUBLISHED["omniglot", f"{config['ways']}w{config['shots']}s"]["maml"]


def _fast_minutes(results: Path, found: dict[str, Any]) -> str:
    """Minutes of both phases, with evaluation."""
    both = (read_json(results / FAST_START / "results.json")["made_by"], found["made_by"])
    spans = [datetime.fromisoformat(made["finished"]) - datetime.fromisoformat(made["started"]) for made in both]
    return f"{sum(span.total_seconds() for span in spans) / 60:.0f}"


def normalisation(results: Path) -> str:
    """Accuracy of three normalisations, transductive and inductive."""
    rows = []
    for name, title in (
        ("batch", "batch: statistics of the batch, as in the paper"),
        ("tasknorm", "tasknorm: support set and example"),
        ("layer", "layer: the example"),
    ):
        test = read_json(results / f"omniglot-5w1s-order1-{name}-3k" / "results.json")["test"]
        cells = [f"{test[key]['accuracy'][1]:.2f} ± {test[key]['half_width'][1]:.2f}"
                 for key in (compare.TRANSDUCTIVE, compare.INDUCTIVE) if key in test]  # fmt: skip
        rows.append([title, *cells, *(["the same: queries are independent"] * (2 - len(cells)))])
    return table(("normalisation", "transductive, %", "inductive, %"), rows)


# Reinforcement learning


def rl_returns(results: Path) -> str:
    """Returns of each environment and method, before and after each gradient step."""
    parts = []
    for environment, title in returns.TITLES.items():
        lines = [line for line in returns.found(results) if line.environment == environment]
        columns = ("method", "meta-iterations", "inner rates", "before", "1 step", "2 steps", "3 steps", "improved",
                   "gain of step 1", "run")  # fmt: skip
        rows = []
        for method, name in returns.METHODS.items():
            mine = [line for line in lines if line.method == method]
            rows += [_return_cells(line) for line in mine]
            theirs = next((line.results["paper"][method] for line in mine if method in line.results["paper"]), ())
            if theirs:
                cells = [f"{value:g}" for value in theirs] + [""] * (4 - len(theirs))
                steps = str(PAPER_STEPS[environment]) if method == "maml" else ""
                rows.append([f"*{name}, paper*", steps, "", *cells, "", "", ""])
        parts += [f"### {title}\n", table(columns, rows)]
    return "\n".join(parts)


def _return_cells(line: returns.Line) -> list[str]:
    rows = line.rows
    rates = dict.fromkeys("{:g}, {:g}".format(*row["rates"]) for row in rows if row["rates"])
    means = [_return(line, step) for step in range(len(rows[0]["return"]))]
    improved = f"{np.mean([row['improved'][0] for row in rows]):.0%}" if rates else ""
    by_task = mean_by_task(rows) if rates else None
    gain = ""
    if by_task is not None and len(by_task) > 1:
        mean, half_width = interval(by_task[1] - by_task[0])
        gain = f"{mean:+.1f} ± {half_width:.1f}"
    meta_iterations = str(line.steps) if line.steps else ""
    run = f"`{Path(line.folder).name}`"
    return [
        returns.description(line),
        meta_iterations,
        " or ".join(rates),
        *means,
        *([""] * (4 - len(means))),
        improved,
        gain,
        run,
    ]


def rl_runs(results: Path) -> str:
    """Provenance of the returns."""
    rows = []
    for folder in sorted(dict.fromkeys(line.folder for line in returns.found(results))):
        found = read_json(Path(folder) / "results.json")
        seeds = ", ".join(map(str, found["config"]["seeds"]))
        rows.append([f"`{Path(folder).name}`", seeds, found.get("mujoco", ""), *page.cost(found["made_by"])])
    return table(("run", "seeds", "MuJoCo", "hours", "hardware", "commit", "date"), rows)


# Speed


def _fastest(rows: list[dict[str, Any]], workload: str, order: int, kind: str) -> dict[str, Any]:
    found = [row for row in rows if (row["workload"], row["order"], row["kind"]) == (workload, order, kind)]
    return min(found, key=lambda row: row["ms"])


def speed(results: Path) -> str:
    """Time of a meta-step beside PyTorch."""
    rows = []
    for folder, workloads in (
        ("benchmark-sinusoid", ["sinusoid"]),
        ("benchmark-against-torch", ["omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s"]),
    ):
        measured = read_json(results / folder / "results.json")["rows"]
        for workload in workloads:
            cells = [WORKLOADS[workload]]
            ours = {order: _fastest(measured, workload, order, "ours") for order in (2, 1)}
            for order in (2, 1):
                peer = _fastest(measured, workload, order, "peer")
                cells += [_milliseconds(ours[order]["ms"]), f"{peer['ms'] / ours[order]['ms']:.1f}x"]
            cells.append(f"{ours[2]['ms'] / ours[1]['ms']:.1f}x")
            rows.append(cells)
    head = ("meta-step", "second order", "faster than PyTorch", "first order", "faster than PyTorch",
            "second over first")  # fmt: skip
    return table(head, rows)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def limits(results: Path) -> str:
    """Operations of both orders, and the share of the machine's limit."""
    rows = []
    for folder, workloads in (
        ("benchmark-sinusoid", ["sinusoid"]),
        ("benchmark-against-torch", ["omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s"]),
    ):
        measured = read_json(results / folder / "results.json")["rows"]
        for workload in workloads:
            second, first = (_fastest(measured, workload, order, "ours") for order in (2, 1))
            rows.append([
                WORKLOADS[workload],
                f"{second['ms'] / first['ms']:.1f}",
                f"{second['gflop'] / first['gflop']:.1f}",
                f"{second['share_of_limit']:.0%}",
            ])  # fmt: skip
    return table(("meta-step", "time, second over first", "operations, second over first", "of the limit"), rows)


def gpu(results: Path) -> str:
    """Second order on one GPU."""
    found = read_json(results / "benchmark-h200" / "results.json")["rows"]
    rows = []
    for row in (row for row in found if "ratio" in row):
        name, peer = WORKLOADS[row["workload"]], row["torch.func_ms"]
        rows.append([name, f"{row['ms']:.2f} ms", f"{peer:.1f} ms", f"{row['ratio']:.0f}x"])
    return table(("meta-step", "ours", "torch.func", "faster"), rows)


def breakdown(results: Path) -> str:
    """Shares of the time of a meta-step on one core."""
    rows = []
    for row in read_json(results / "breakdown" / "results.json")["rows"]:
        shares = row["shares"]
        rows.append([
            f"{WORKLOADS[row['workload']]}, {'second' if row['order'] == 2 else 'first'}",
            f"{shares['products and convolutions']:.0%}",
            f"{row['products_of_limit']:.0%}",
            f"{shares.get('windows put together', 0) + shares.get('slices, pads and their transposes', 0):.0%}",
            f"{shares.get('copies and transposes', 0):.0%}",
            f"{shares.get('each entry alone', 0) + shares.get('sums', 0):.0%}",
            f"{shares.get('stacks over inner steps', 0):.0%}",
        ])  # fmt: skip
    head = ("meta-step, order", "products", "of the limit in them", "images to rows", "copies", "elementwise, sums",
            "residuals of inner steps")  # fmt: skip
    return table(head, rows)


def memory(results: Path) -> str:
    """Time and memory by order and remat."""
    measured = [
        row
        for folder in ("benchmark-checkpoints", "benchmark-checkpoints-32")
        for row in read_json(results / folder / "results.json")["rows"]
    ]
    by_key = {(row["workload"], row["inner_steps"], row["order"], _remat(row)): row for row in measured}
    names = ("transformer", "omniglot-20w1s", "miniimagenet-5w1s")
    rows = []
    for steps in (16, 32):
        for order, remat in ((1, "none"), (2, "none"), (2, "full"), (2, "mixflow")):
            cells = []
            for name in names:
                row = by_key.get((name, steps, order, remat))
                cells += ["", ""] if row is None else [f"{row['ms']:.0f} ms", f"{row['memory_compiled'] / 1e6:.0f} MB"]
            if any(cells):
                rows.append([str(steps), "first" if order == 1 else f'second, `remat="{remat}"`', *cells])
    head = ("inner steps", "order", *(cell for name in names for cell in (f"{WORKLOADS[name]}: time", "memory")))
    return table(head, rows)


def _remat(row: dict[str, Any]) -> str:
    return row["remat"] if "remat" in row else {"none": "none", "step": "full", "mixed": "mixflow"}[row["checkpoint"]]


def rl_speed(results: Path) -> str:
    """Environment steps and shares of a meta-iteration."""
    rows = []
    parts = ("episodes", "inner steps and meta-gradient", "trust region")
    for folder, curvature in (("rl-speed", "half"), ("rl-speed-navigation", "all")):
        for row in read_json(results / folder / "results.json")["rows"]:
            rows.append([
                PROBLEMS[row["problem"]],
                curvature,
                f"{row['steps_per_cpu_second']:,.0f}",
                f"{row['iterations_per_cpu_second']:.2f}",
                *(f"{row['shares'][name]:.0%}" for name in parts),
            ])  # fmt: skip
    return table(("environment", "tasks in the curvature", "environment steps", "meta-iterations", *parts), rows)


REGIONS: dict[str, Callable[[Path], str]] = {
    "paper": paper,
    "sine curves": sine_curves,
    "few-shot": few_shot,
    "normalisation": normalisation,
    "fast recipe": fast_recipe,
    "recipe probes": recipe_probes,
    "protocols": protocols,
    "runs": runs,
    "returns": rl_returns,
    "rl runs": rl_runs,
    "speed": speed,
    "limits": limits,
    "gpu": gpu,
    "breakdown": breakdown,
    "memory": memory,
    "rl speed": rl_speed,
}
"""Name of a region -> its content, from the folder of results."""


def prepare(config: Config) -> Config:
    """Checks the paths. Raises ValueError if the folder of results or a page does not exist."""
    for path in (config.results, *(config.root / name for name in PAGES)):
        if not path.exists():
            raise ValueError(f"{path} does not exist. Run the command in the folder of the README, or give --root.")
    return config


def main(config: Config) -> None:
    """Writes all pages."""
    for name in PAGES:
        path = config.root / name
        path.write_text(render(path.read_text("utf-8"), config.results), encoding="utf-8")
        print(f"Wrote {path}.")


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
