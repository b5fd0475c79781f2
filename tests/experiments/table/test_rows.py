"""Each row of the table is a valid run. Published accuracies, and the choice of rows."""

from pathlib import Path

import pytest
import tyro

from experiments import reproduce
from experiments.few_shot.run import TEST_STEPS
from experiments.table import rows
from experiments.table.rows import BY_NAME


@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.name)
def test_each_row_is_a_valid_run(row):
    run_type = rows.EXPERIMENTS[row.experiment]
    run = run_type(**row.options).resolved()
    assert f"{run.ways}w{run.shots}s" == row.setting
    assert 1 <= row.inner_steps <= TEST_STEPS and row.method in rows.METHODS
    # The command of the row gives the same run.
    flags = reproduce.command(reproduce.Config(), row, 3)
    parsed = tyro.cli(run_type, args=flags[3:], config=(tyro.conf.FlagCreatePairsOff,))
    assert parsed.resolved().record() == run.record() | {
        "row": row.name,
        "data_dir": Path("data/omniglot" if row.data == "omniglot" else "data/miniimagenet"),
        "seed": 3,
        "workdir": Path("runs/reproduce") / f"{row.name}-seed3",
    }


def test_rows_have_different_names_and_runs():
    assert len(BY_NAME) == len(rows.ROWS)
    keys = [(row.experiment, *sorted(row.options.items())) for row in rows.ROWS if row.data != "miniimagenet"]
    assert len(set(keys)) == len(keys)


def test_rows_have_their_published_accuracies():
    for setting in ("5w1s", "5w5s", "20w1s", "20w5s"):
        assert BY_NAME[f"omniglot-{setting}"].published and BY_NAME[f"omniglot-{setting}-order1"].published
    assert BY_NAME["omniglot-20w1s-fast"].published == (95.8, 0.3, rows.FINN)
    assert BY_NAME["miniimagenet-5w5s-fast"].published == (63.11, 0.92, rows.FINN)
    assert BY_NAME["omniglot-5w5s-mlp"].published == (97.5, 0.6, rows.FINN)
    assert BY_NAME["miniimagenet-5w1s"].published == (48.70, 1.84, rows.FINN)
    assert BY_NAME["omniglot-20w1s-maml++"].published.accuracy == 97.65
    for method in ("", "-order1", "-anil", "-meta-sgd", "-maml++", "-pretrained"):
        assert BY_NAME[f"images-5w5s{method}"].published is None  # Nobody has published accuracies on these images.


def test_rows_have_the_steps_of_their_recipe():
    assert {row.steps for row in rows.ROWS if row.method != "fast"} == {60_000}
    assert (BY_NAME["omniglot-20w5s-fast"].steps, BY_NAME["miniimagenet-5w1s-fast"].steps) == (40, 400)


def test_inner_steps_are_those_of_the_published_protocol():
    assert [BY_NAME[f"omniglot-{name}"].inner_steps for name in ("5w1s", "20w1s", "5w1s-imaml")] == [3, 5, 10]
    assert (BY_NAME["images-5w5s"].inner_steps, BY_NAME["images-5w5s-maml++"].inner_steps) == (10, 5)


def test_rows_are_chosen_by_name_and_pattern():
    assert [row.name for row in rows.choose(["images-5w1s", "omniglot-20w1s"])] == ["omniglot-20w1s", "images-5w1s"]
    assert {row.setting for row in rows.choose(["omniglot-5w?s*"])} == {"5w1s", "5w5s"}
    with pytest.raises(ValueError, match="no row matches 'omniglot-5w1z'; similar rows are omniglot-5w1s"):
        rows.choose(["omniglot-5w1z"])
