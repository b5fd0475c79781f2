"""Runs of reinforcement learning in a folder of results, and plots of their returns over tasks."""

import json
from pathlib import Path

import pytest

from experiments.reinforcement import evaluation, plots
from experiments.table import returns

ROOT = Path(__file__).parents[3]


def made_up(folder, environment="ant-velocity", rows=(), steps=30, **config):
    folder.mkdir(parents=True)
    results = {
        "environment": environment,
        "config": {"inner_loss": "logp", "test_tasks": 40, "steps": steps, **config},
        "paper": {"maml": [1, 2.5, 3, 4], "oracle": [9]},
        "mujoco": "3.17.0",
        "rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(results))


def row(method="maml", seed=0, first=0.0, improved=0.5):
    values = [first + step for step in range(1 if method == "oracle" else 4)]
    rates = None if method == "oracle" else [0.1, 0.05]
    return {
        "method": method,
        "seed": seed,
        "rates": rates,
        "return": values,
        "half_width": [0.25] * len(values),
        "improved": [improved] if rates else [],
    }


def test_a_description_names_the_options_that_differ_from_the_papers(tmp_path):
    made_up(tmp_path / "a", rows=[row("oracle"), row("maml", 0), row("maml", 1)], kl_limit=0.01, curvature_tasks=10)
    made_up(tmp_path / "b", rows=[row("random")], inner_loss="lvc", gae_lambda=0.9, test_tasks=400, kl_limit=0.03)
    made_up(tmp_path / "c", "half-cheetah-direction", rows=[row()], steps=5, kl_limit=0.01, inner_steps=2)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "results.json").write_text('{"protocol": "of another kind"}')
    lines = returns.found(tmp_path)
    assert [(Path(line.folder).name, returns.description(line), line.steps, len(line.rows)) for line in lines] == [
        ("a", "MAML, curvature of 10 tasks", 30, 2),
        ("c", "MAML, 2 inner steps, trust region 0.01", 5, 1),
        ("b", "untrained, `lvc`, lambda of GAE 0.9, 400 test tasks", 0, 1),
        ("a", "oracle, curvature of 10 tasks", 30, 1),
    ]


def test_returns_are_plotted_over_velocities_with_the_oracle_in_all_panels(tmp_path, monkeypatch):
    def with_tasks(row, tasks, returns, kinds=None):
        return row | {"tasks": [tasks], "return_of_task": returns, "return_of_kind": kinds or {}}

    seeds = [with_tasks(row(), "2 1", ["5 3", "6 4"]), with_tasks(row(seed=1), "2 1", ["7 3", "9 5"])]
    made_up(tmp_path / "results" / "a", rows=seeds, steps=30, kl_limit=0.03)
    made_up(tmp_path / "results" / "again", rows=seeds[:1], steps=30, kl_limit=0.03)
    made_up(tmp_path / "results" / "b", rows=[with_tasks(row("oracle"), "2 1", ["9 8"])])
    made_up(tmp_path / "results" / "b2", rows=[with_tasks(row("oracle"), "2 1", ["0 0"])], steps=20)
    made_up(tmp_path / "results" / "without tasks", rows=[row()], steps=20)
    directions = with_tasks(row(), "1 -1", ["5 3", "6 4"], {"1": [5, 6], "-1": [3, 4]})
    made_up(tmp_path / "results" / "c", "ant-direction", rows=[directions])
    plotted, plot = [], plots.returns_over_tasks

    def watched(path, methods, oracle):
        if plot(path, methods, oracle):
            plotted.append((path.name, methods, oracle))

    monkeypatch.setattr("experiments.reinforcement.plots.returns_over_tasks", watched)
    config, lines = returns.prepare(returns.Config(tmp_path / "results"))
    returns.main((config, lines))
    ((name, methods, oracle),) = plotted
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == [name] == ["ant-velocity-tasks.png"]
    panels = ["MAML, trust region 0.03, 30", "MAML, trust region 0.03, 30 (again)", "MAML, 20"]
    assert [*methods] == panels and oracle[0]["return_of_task"] == ["9 8"]
    assert evaluation.mean_by_task(methods[panels[0]]).tolist() == [[6, 3], [7.5, 4.5]]
    assert evaluation.mean_by_task(methods[panels[2]]) is None


def test_a_folder_without_returns_raises(tmp_path):
    with pytest.raises(ValueError, match="holds no runs of reinforcement learning"):
        returns.prepare(returns.Config(tmp_path))


def test_the_committed_results_cover_all_environments():
    lines = returns.found(ROOT / "results")
    assert {line.environment for line in lines} == returns.TITLES.keys()
    assert returns.description(lines[0]).startswith("MAML")
