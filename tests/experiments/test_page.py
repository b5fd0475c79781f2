"""The table of all rows: what it holds, and how it is rendered."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from helpers.made_up_runs import BY_NAME, ROOT, as_json, made_up, start

from experiments import reproduce
from experiments.few_shot import options as few_shot
from experiments.table import compare, page, rows
from maml_jax import evaluation
from maml_jax.evaluation import Protocol, Results
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import utc

# Rows


def test_rows_are_the_papers_table_and_each_is_a_valid_experiment():
    assert len(BY_NAME) == len(rows.ROWS)
    for row in rows.ROWS:
        module = rows.EXPERIMENTS[row.experiment]
        config, setting = module.settle(module.Config(**row.options))
        assert f"{setting.ways}w{setting.shots}s" == row.setting
        assert 1 <= row.inner_steps <= few_shot.TEST_STEPS and row.method in rows.METHODS
        flags = reproduce.command(reproduce.Config(), row, 3)
        parsed = tyro.cli(module.Config, args=flags[3:], config=(tyro.conf.FlagCreatePairsOff,))
        assert few_shot.recorded(*module.settle(parsed)) == few_shot.recorded(config, setting) | {
            "data_dir": Path("data/omniglot" if row.data == "omniglot" else "data/miniimagenet"),
            "seed": 3,
            "workdir": Path("runs/reproduce") / f"{row.name}-seed3",
        }
        # What a run of the row writes is found to be of that row, and no other.
        written = {"experiment": row.experiment, "config": vars(config), "setting": vars(setting)}
        assert rows.row_of(json.loads(as_json(written))) is row
        tuned = written | {"setting": vars(setting) | {"inner_rate": 0.123}}
        assert rows.row_of(json.loads(as_json(tuned))) is (row if row.method == "pretrained" else None)
        given = tuned | {"config": vars(config) | {"inner_rate": 0.123}}
        assert rows.row_of(json.loads(as_json(given))) is None
    for setting in ("5w1s", "5w5s", "20w1s", "20w5s"):
        assert BY_NAME[f"omniglot-{setting}"].published and BY_NAME[f"omniglot-{setting}-order1"].published
    assert BY_NAME["omniglot-5w5s-mlp"].published == (97.5, 0.6, rows.FINN)
    assert BY_NAME["miniimagenet-5w1s"].published == (48.70, 1.84, rows.FINN)
    assert BY_NAME["omniglot-20w1s-maml++"].published.accuracy == 97.65
    assert [BY_NAME[f"omniglot-{name}"].inner_steps for name in ("5w1s", "20w1s", "5w1s-imaml")] == [3, 5, 10]
    assert (BY_NAME["images-5w5s"].inner_steps, BY_NAME["images-5w5s-maml++"].inner_steps) == (10, 5)
    for method in ("", "-order1", "-anil", "-meta-sgd", "-maml++", "-pretrained"):
        assert BY_NAME[f"images-5w5s{method}"].published is None  # Nobody's numbers are of those images.


def test_a_run_with_another_option_is_of_no_row(tmp_path):
    made_up(tmp_path / "run", "omniglot-5w1s")
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    assert compare.read(tmp_path / "run").row is BY_NAME["omniglot-5w1s"]
    results["setting"]["tasks"] = 8
    path.write_text(json.dumps(results))
    (run,) = compare.find([tmp_path])
    assert run.row is None
    assert "&lt;made &amp; up&gt;" in page.html(compare.group([], [run]), [run])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        compare.find([tmp_path])


# Results


def test_results_task_by_task_come_back_from_their_summary():
    random = np.random.default_rng(0)
    protocol = Protocol("made up", "test", 9, "0" * 64, 40, 0, 5, 1, 3, "none", 10, None, "batch", "together")
    whole = Results(protocol, random.integers(0, 16, (40, 11)) / 15, random.integers(0, 2, (40, 11)) == 1)
    text = as_json(whole.summary())
    back = evaluation.from_summary(json.loads(text))
    assert len(text) < 4000 and back.protocol == protocol
    np.testing.assert_array_equal(back.accuracy, whole.accuracy)
    np.testing.assert_array_equal(back.diverged, whole.diverged)
    cut = json.loads(text)
    cut["correct"] = [line[:10] for line in cut["correct"]]
    with pytest.raises(ValueError, match="says 40 tasks"):
        evaluation.from_summary(cut)
    del cut["correct"]
    with pytest.raises(ValueError, match="task by task"):
        evaluation.from_summary(cut)


# Page


def test_the_page_says_what_was_measured_how_and_what_is_missing(tmp_path):
    runs = tmp_path / "runs"
    found = [made_up(runs / f"a{seed}", "omniglot-5w1s", seed, 10_000, queries_one_by_one=0.2) for seed in (0, 1)]
    full = made_up(runs / "b", "omniglot-5w1s-order1", 0, 60_000)
    made_up(runs / "c", "omniglot-5w1s-order1", 0, 10_000, accuracy=0.5)
    (runs / "omniglot-5w1s-anil-seed0").mkdir()
    (runs / "omniglot-5w1s-anil-seed0" / "metrics.jsonl").write_text('{"step": 20}\n{"step": 1240}\n{"step": 12')
    groups = compare.group(rows.choose(["omniglot-5w1s", "omniglot-5w1s-[ab][no]i*"]), compare.find([runs]))
    assert [group.title for group in groups] == ["Omniglot, 5-way 1-shot"]
    text, table = page.html(groups, []), page.markdown(groups, tmp_path)

    means = [each["test"]["queries together"]["accuracy"][3] for each in found]
    of_seeds = f"{np.mean(means):.2f} ({min(means):.2f} to {max(means):.2f}, 2 seeds)"
    curve, both = groups[0].lines[0].curve(), [each["test"]["queries together"] for each in found]
    np.testing.assert_allclose(curve["accuracy"], np.mean([each["accuracy"] for each in both], 0))
    np.testing.assert_allclose(curve["half_width"], np.hypot(*(each["half_width"] for each in both)) / 2)
    alone = full["test"]["queries together"]
    assert of_seeds in text and of_seeds in table
    assert f"{alone['accuracy'][3]:.2f} ± {alone['half_width'][3]:.2f}" in text
    assert f"| {alone['accuracy'][3]:.2f} +- {alone['half_width'][3]:.2f} |  | 3 | 60,000 | 98.3 +- 0.5 " in table
    assert "98.7 ± 0.4" in text and rows.FINN in text and "98.7 +- 0.4 (Finn et al. 2017, table 1)" in table
    for seed in (0, 1):
        for seen in ("together", "one by one"):
            told = str(Protocol(**found[seed]["test"][f"queries {seen}"]["protocol"]))
            assert f"after 3 inner steps; {told}" in text and f"- {told}" in table
    assert "a1: 2.50 hours, two cores, commit abc, 2026-01-01; the model of meta-step 9,999" in text
    assert "`runs/a1`: 2.50 hours" in table

    assert "| ANIL |  |  | 3 | 1,240 of 60,000 |  |" in table and "| BOIL |  |  | 3 | 0 of 60,000 |  |" in table
    for each in (text, table):
        missing = each[each.index("Short of the full schedule") :]
        assert "omniglot-5w1s: 10,000 of 60,000 meta-steps" in missing
        assert "omniglot-5w1s-anil: in training, 1,240 of 60,000 meta-steps" in missing
        assert "omniglot-5w1s-boil: not begun, 60,000 meta-steps" in missing
        assert "order1" not in missing  # It has the full schedule too.
    assert "4 rows: 1 of the full schedule, 1 short of it, 2 without a result." in text
    # Nothing is fetched from elsewhere: the one picture is in the file.
    assert re.findall(r'(?:src|href)="([^"]{0,22})', text) == ["data:image/png;base64,"]


def test_the_time_of_a_run_is_that_of_all_its_starts(tmp_path):
    made_up(tmp_path / "made", "omniglot-5w1s")
    results = json.loads((tmp_path / "made" / "results.json").read_text())
    run = RunDirectory(tmp_path / "run", "made up", {"a": 1})
    run.close()
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    begun = time.time() - 10 * 3600
    content["starts"][0]["started"] = utc(begun)
    content["starts"][0]["hardware"] = "1 x Another"
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    os.utime(tmp_path / "run" / "metrics.jsonl", (begun + 3 * 3600,) * 2)
    run = RunDirectory(tmp_path / "run", "made up", {"a": 1})
    run.write_results({name: value for name, value in results.items() if name != "made_by"})
    told = compare.read(tmp_path / "run").cost()
    assert told.startswith("3.00 hours in 2 starts, 1 x Another, then ") and told.count("commit") == 1


def test_differences_are_paired_over_the_same_tasks_and_schedule(tmp_path):
    second = made_up(tmp_path / "a", "omniglot-5w1s", 0, 10_000, accuracy=0.9)
    first = made_up(tmp_path / "b", "omniglot-5w1s-order1", 0, 10_000, accuracy=0.5)
    made_up(tmp_path / "c", "omniglot-5w1s-anil", 1, 10_000)  # Of another seed: other tasks.
    made_up(tmp_path / "d", "omniglot-5w1s-boil", 0, 60_000)  # Of another schedule, and there is none of the same.
    made_up(tmp_path / "e", "omniglot-5w1s-order1", 0, 20_000)
    (group,) = compare.group([], compare.find([tmp_path]))
    pair, other = group.paired
    assert (other.first, other.second.method) == (pair.first, "boil")
    assert "MAML, second order minus BOIL, same tasks (seed 0), 10,000 and 60,000 meta-steps: " in page.markdown(
        [group], tmp_path
    )
    both = [evaluation.from_summary(each["test"]["queries together"]) for each in (second, first)]
    assert pair.difference == evaluation.difference(*both, steps=(3, 3)) and pair.difference.low > 0
    what = f"MAML, second order minus MAML, first order, same tasks (seed 0), 10,000 meta-steps: {pair.difference}"
    assert what in page.markdown([group], tmp_path)
    assert f"<b>{pair.difference}</b>" in page.html([group], [])


def test_pretraining_gives_two_lines_and_images_are_named_as_what_they_are(tmp_path):
    made_up(tmp_path / "a", "images-5w1s-pretrained", 0, 500, nearest_neighbour=0.4)
    made_up(tmp_path / "b", "images-5w1s", 0, 500)
    (group,) = compare.group([], compare.find([tmp_path]))
    assert group.title == "made up, 5-way 1-shot"
    assert [(line.title, line.inner_steps) for line in group.lines] == [
        ("MAML, second order", 10),
        ("pretraining and fine-tuning", 10),
        ("pretraining and nearest neighbour", 0),
    ]
    assert len(group.paired) == 2 and group.others == {}
    assert len(re.findall("<tr><td>", page.html([group], []))) == 3


def test_an_ensemble_has_a_line_of_its_own(tmp_path):
    made_up(tmp_path / "a", "omniglot-5w1s-maml++", ensemble=0.95)
    made_up(tmp_path / "b", "omniglot-5w1s", queries_one_by_one=0.2)
    (group,) = compare.group([], compare.find([tmp_path]))
    plain, single, together = group.lines
    assert (single.title, together.title) == ("MAML++", "MAML++, ensemble") and not together.apart() and plain.apart()
    assert single.published == together.published == (99.47, None, rows._QUOTED[8][1]) and "maml++" not in group.others
    assert [pair.second for pair in group.paired] == [single, together]
    (number,) = together.numbers()
    assert number.accuracy > single.numbers()[0].accuracy and number.inner_steps == single.row.inner_steps
    text = page.markdown([group], tmp_path)
    assert f"`b`: {plain.runs[0].cost()}" in text and "the best models together, selected" in text
    assert compare.labels(single.row) == ("queries together", "queries one by one", "ensemble")


def test_queries_that_do_not_see_each_other_have_one_accuracy(tmp_path):
    made_up(tmp_path / "a", "omniglot-5w1s-norm-tasknorm")
    made_up(tmp_path / "b", "omniglot-5w1s")
    batch, tasknorm = compare.group([], compare.find([tmp_path]))[0].lines
    assert batch.apart() == [] and tasknorm.apart() == tasknorm.numbers() != []


def test_rendering_alone_writes_the_region_of_a_readme_from_the_results(tmp_path, capsys):
    made_up(tmp_path / "kept" / "a", "omniglot-5w1s", 0, 10_000)
    made_up(tmp_path / "work" / "b", "omniglot-5w1s-order1", 0, 20_000)
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n{page.BEGIN}old\n{page.END}\nAfter.\n")
    start(tmp_path, rows=("omniglot-20w5s",), render_only=True, results=(tmp_path / "kept",), readme=readme)
    text, table = readme.read_text(), (tmp_path / "work" / "table.md").read_text()
    assert text.startswith(f"Before.\n{page.BEGIN}Accuracy") and text.endswith(f"\n{page.END}\nAfter.\n")
    assert "`kept/a`" in text and "10,000 of 60,000" in text and "old" not in text
    assert "20,000 of 60,000" not in text and "20-way" not in text and "omniglot-" not in text
    assert "20,000 of 60,000" in table and "`../kept/a`" in table and "Omniglot, 20-way 5-shot" in table
    assert str(tmp_path / "work" / "index.html") in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "work").glob("*.png")] == ["inner-steps-omniglot-5w1s.png"]


def test_the_readme_shows_what_results_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text()
    rendered = page.markdown(compare.group([], compare.find([Path("results")])), Path(), unfinished=False)
    assert page.with_region(text, rendered) == text, (
        "The README's table is not what results/ holds: "
        "python -m experiments.reproduce --render-only --results results --readme README.md"
    )
    with pytest.raises(ValueError, match="once each"):
        page.with_region(text + page.BEGIN, rendered)


def test_a_run_that_is_there_twice_is_one_seed(tmp_path):
    """Such as in a work directory and, committed, in another: of each seed the latest counts."""
    made_up(tmp_path / "first", "omniglot-5w1s", accuracy=0.5)
    made_up(tmp_path / "second", "omniglot-5w1s", accuracy=0.9)
    path = tmp_path / "second" / "results.json"
    path.write_text(path.read_text().replace("2026-01-01T02:30:00Z", "2026-01-02T02:30:00Z"))
    made_up(tmp_path / "third", "omniglot-5w1s", seed=1)
    (line,) = compare.group([], compare.find([tmp_path]))[0].lines
    assert [(run.path.name, run.seed) for run in line.runs] == [("second", 0), ("third", 1)]
