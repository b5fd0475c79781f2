"""Tables of reinforcement learning for README.md and docs/."""

from pathlib import Path

import numpy as np

from experiments.reinforcement.evaluation import mean_by_task
from experiments.table import page, returns
from experiments.table.page import table
from maml_jax.evaluation import interval
from maml_jax.runs.files import read_json


def paper(results: Path) -> list[list[str]]:
    """Rows of our returns beside the paper's, with the paper's inner loss; the longest training comes first."""
    runs = [run for run in returns.found(results) if run.method == "maml"]
    runs = [run for run in runs if run.results["config"]["inner_loss"] == "logp"]
    rows = []
    for environment, title in returns.TITLES.items():
        for run in [run for run in runs if run.environment == environment][:1]:
            others = returns.PAPER[environment].steps
            training = f"{run.steps} meta-iterations" + ("" if others == run.steps else f" (paper: {others})")
            theirs = f"{run.results['paper']['maml'][1]:g}"
            rows.append([title, "return after 1 step", _return(run, 1), theirs, training])
    return rows


def all_returns(results: Path) -> str:
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
                steps = str(returns.PAPER[environment].steps) if method == "maml" else ""
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


def runs(results: Path) -> str:
    """Provenance of the returns."""
    rows = []
    for folder in sorted(dict.fromkeys(line.folder for line in returns.found(results))):
        found = read_json(Path(folder) / "results.json")
        seeds = ", ".join(map(str, found["config"]["seeds"]))
        rows.append([f"`{Path(folder).name}`", seeds, found.get("mujoco", ""), *page.cost(found["made_by"])])
    return table(("run", "seeds", "MuJoCo", "hours", "hardware", "commit", "date"), rows)


def _return(line: returns.Line, step: int) -> str:
    """Mean return after some gradient steps, over the seeds."""
    found = [row["return"][step] for row in line.rows]
    if len(found) == 1:
        return f"{found[0]:.1f} ± {line.rows[0]['half_width'][step]:.1f}"
    return f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f}, {len(found)} seeds)"
