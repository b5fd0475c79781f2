"""Tables of returns against results; what they cannot be written into or made of is told."""

import json
from pathlib import Path

import pytest

from experiments.table import page, returns

ROOT = Path(__file__).parents[2]


def made_up(folder, environment="ant-velocity", rows=(), steps=30, **config):
    folder.mkdir(parents=True)
    results = {
        "config": {"inner_loss": "logp", "test_tasks": 40, **config},
        "setting": {"steps": steps},
        "protocol": f"{environment}: mean return",
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


def cells_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_tables_tell_each_method_with_its_paper_and_engine(tmp_path):
    made_up(tmp_path / "a", rows=[row("oracle"), row("maml", 0, 10.0), row("maml", 1, 12.0, improved=1.0)])
    made_up(tmp_path / "b", rows=[row("random", first=-7.0)], inner_loss="lvc", test_tasks=400, inner_steps=2)
    made_up(tmp_path / "c", "half-cheetah-velocity", rows=[row()], steps=5)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "results.json").write_text('{"protocol": "something else: accuracy"}')
    text = returns.markdown(returns.found(tmp_path))
    cells = cells_of(text)
    assert [line[0] for line in cells] == [
        "Half-cheetah, velocity", "MAML",
        "Ant, velocity", "MAML", "not trained, `lvc`, inner_steps 2, 400 tasks", "oracle, told the task",
    ]  # fmt: skip
    assert cells[1][1:] == ["5", "0.1, 0.05", "0.0 +- 0.2", "1.0 +- 0.2", "2.0 +- 0.2", "3.0 +- 0.2", "50%",
                            "", "1, 2.5, 3, 4"]  # fmt: skip
    assert cells[3][1:5] == ["30", "0.1, 0.05", "11.00 (10.0 to 12.0, 2 seeds)", "12.00 (11.0 to 13.0, 2 seeds)"]
    assert cells[3][7] == "75%" and cells[4][1] == "" and cells[4][3] == "-7.0 +- 0.2"
    assert cells[5][1:] == ["30", "", "0.0 +- 0.2", "", "", "", "", "", "9"]
    assert f"`{tmp_path.as_posix()}/b` (MuJoCo 3.17.0)" in text.replace("\n", " ")


def test_returns_are_drawn_over_tasks_that_are_numbers_with_the_oracle_for_all(tmp_path, monkeypatch):
    def of_tasks(row, tasks, returns, kinds=None):
        return row | {"tasks": [tasks], "return_of_task": returns, "return_of_kind": kinds or {}}

    seeds = [of_tasks(row(), "2 1", ["5 3", "6 4"]), of_tasks(row(seed=1), "2 1", ["7 3", "9 5"])]
    made_up(tmp_path / "results" / "a", rows=seeds, steps=30, kl_limit=0.03)
    made_up(tmp_path / "results" / "again", rows=seeds[:1], steps=30, kl_limit=0.03)
    made_up(tmp_path / "results" / "b", rows=[of_tasks(row("oracle"), "2 1", ["9 8"])])
    made_up(tmp_path / "results" / "b2", rows=[of_tasks(row("oracle"), "2 1", ["0 0"])], steps=20)
    made_up(tmp_path / "results" / "older", rows=[row()], steps=20)
    directions = of_tasks(row(), "1 -1", ["5 3", "6 4"], {"1": [5, 6], "-1": [3, 4]})
    made_up(tmp_path / "results" / "c", "ant-direction", rows=[directions])
    drawn, draw = [], returns.reinforcement_testing.plots.returns_of_tasks

    def watched(path, methods, bound):
        drawn.append((path.name, methods, bound))
        draw(path, methods, bound)

    monkeypatch.setattr("experiments.reinforcement.plots.returns_of_tasks", watched)
    readme = tmp_path / "README.md"
    readme.write_text(f"{returns.BEGIN}{returns.END}")
    returns.main(returns.prepare(returns.Config(tmp_path / "results", readme)))
    ((name, methods, (_, bound)),) = drawn
    assert name == "ant-velocity-tasks.png" and (tmp_path / "results" / name).stat().st_size > 1000
    assert [*methods] == ["MAML, kl_limit 0.03, 30", "MAML, kl_limit 0.03, 30 (again)"]
    tasks, found = methods["MAML, kl_limit 0.03, 30"]
    assert tasks.tolist() == [2, 1]
    assert found.tolist() == [[6, 3], [7.5, 4.5]] and bound.tolist() == [[9, 8]]
    gains = [line[-2] for line in cells_of(readme.read_text())]
    assert gains == ["gains", "+1.5 +- 0.0", "+1.0 +- 0.0", "", "", "", "gains", "+1.0 +- 0.0"]


def test_only_the_region_of_the_readme_is_written(tmp_path):
    made_up(tmp_path / "results" / "a", rows=[row()])
    readme = tmp_path / "README.md"
    config = returns.Config(tmp_path / "results", readme)
    readme.write_text("No marks.\n")
    with pytest.raises(ValueError, match="must hold the lines '<!-- returns: begin -->'"):
        returns.prepare(config)
    readme.write_text(f"Before.\n{returns.BEGIN}old\n{returns.END}After.\n{page.BEGIN}kept\n{page.END}")
    returns.main(returns.prepare(config))
    text = readme.read_text()
    assert text.startswith(f"Before.\n{returns.BEGIN}Mean return") and "old" not in text
    assert text.endswith(f"{returns.END}After.\n{page.BEGIN}kept\n{page.END}")
    (tmp_path / "results" / "a" / "results.json").unlink()
    with pytest.raises(ValueError, match="holds no runs of reinforcement learning"):
        returns.prepare(config)


def test_the_readme_shows_what_results_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text()
    rendered = returns.markdown(returns.found(Path("results")))
    assert page.with_region(text, rendered, returns.BEGIN, returns.END) == text, (
        "The README's tables of returns are not what results/ holds: "
        "python -m experiments.table.returns --results results --readme README.md"
    )
