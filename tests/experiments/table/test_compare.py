"""Runs by row of the table: reading, costs, paired differences, evaluations, seeds."""

import json
import os
import time

import numpy as np
import pytest
from helpers.made_up_runs import made_up, unfinished

from experiments.table import compare, page
from experiments.table.rows import BY_NAME, PUBLISHED
from maml_jax import evaluation
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError, utc


def test_a_run_belongs_to_the_row_that_its_results_name(tmp_path):
    path = tmp_path / "run" / "results.json"
    made_up(path.parent, "omniglot-5w1s")
    assert compare.read(path.parent).row is BY_NAME["omniglot-5w1s"]
    results = json.loads(path.read_text())
    for name in (None, "omniglot-5w1z"):
        path.write_text(json.dumps(results | {"row": name}))
        (run,) = compare.find([tmp_path])
        assert run.row is None
    path.write_text(path.read_text()[:-20])
    with pytest.raises(WorkdirError, match=r"results\.json cannot be read"):
        compare.find([tmp_path])
    changes = {
        "row must be a text or null, but is 5": {"row": 5},
        "config.seed must be an integer, but is '<script>'": {"config": results["config"] | {"seed": "<script>"}},
        "made_by.finished is missing": {"made_by": {"command": ""}},
        "test.transductive is missing": {"test": {}},
        "test.transductive.protocol.new is unknown": {
            "test": {"transductive": {"protocol": results["test"]["transductive"]["protocol"] | {"new": 1}}}
        },
    }
    for message, change in changes.items():
        path.write_text(json.dumps(results | change))
        with pytest.raises(WorkdirError, match=rf"results\.json has another form: .*{message}"):
            compare.find([tmp_path])


def test_a_run_without_results_belongs_to_the_row_in_run_json(tmp_path):
    unfinished(tmp_path / "a", "omniglot-5w1s-anil", seed=3)
    (run,) = compare.find([tmp_path])
    assert (run.row, run.seed, run.trained, run.steps) == (BY_NAME["omniglot-5w1s-anil"], 3, 1240, 0)
    (tmp_path / "b").mkdir()
    assert compare.read(tmp_path / "b") is None  # The directory holds no run.
    (tmp_path / "b" / "run.json").write_text('{"config": null}')
    assert compare.read(tmp_path / "b") is None  # The directory holds a run without a configuration.
    (tmp_path / "b" / "run.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"run\.json cannot be read"):
        compare.find([tmp_path])
    for content, message in (
        ({}, "config is missing"),
        ({"config": [1]}, "config must be an object or null"),
        ({"config": {"row": "omniglot-5w1s"}}, "config.seed is missing"),
    ):
        (tmp_path / "b" / "run.json").write_text(json.dumps(content))
        with pytest.raises(WorkdirError, match=rf"run\.json has another form: {message}"):
            compare.find([tmp_path])
    (tmp_path / "b" / "run.json").write_text('{"config": {"row": ["omniglot-5w1s"]}}')
    assert compare.read(tmp_path / "b") is None  # The run of another experiment.
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 20}\n{"step": null}\n{"step": "x"}\n[1]\n')
    assert compare.read(tmp_path / "a").trained == 20


def test_a_curve_is_the_mean_over_seeds(tmp_path):
    found = [made_up(tmp_path / f"{seed}", "omniglot-5w1s", seed) for seed in (0, 1)]
    (group,) = compare.group([], compare.find([tmp_path]))
    curve, both = group.lines[0].curve(), [each["test"]["transductive"] for each in found]
    np.testing.assert_allclose(curve["accuracy"], np.mean([each["accuracy"] for each in both], 0))
    np.testing.assert_allclose(curve["half_width"], np.hypot(*(each["half_width"] for each in both)) / 2)


def test_the_time_of_a_run_is_the_sum_over_its_starts(tmp_path):
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
    run = compare.read(tmp_path / "run")
    cost = run.cost()
    assert cost.startswith("3.00 hours in 2 starts, 1 x Another, then ") and cost.count("commit") == 1
    assert compare.hours(run.made_by) == pytest.approx(3, abs=0.01)


def test_differences_are_paired_over_the_same_tasks_and_schedule(tmp_path):
    second = made_up(tmp_path / "a", "omniglot-5w1s", 0, 10_000, accuracy=0.9)
    first = made_up(tmp_path / "b", "omniglot-5w1s-order1", 0, 10_000, accuracy=0.5)
    made_up(tmp_path / "c", "omniglot-5w1s-anil", 1, 10_000)  # Another seed has other tasks.
    made_up(tmp_path / "d", "omniglot-5w1s-boil", 0, 60_000)  # The only schedule of this row.
    made_up(tmp_path / "e", "omniglot-5w1s-order1", 0, 20_000)
    (group,) = compare.group([], compare.find([tmp_path]))
    pair, other = group.paired
    assert (other.first, other.second.method) == (pair.first, "boil")
    assert "| BOIL | 10,000 and 60,000 | 0 | " in page.markdown([group])
    both = [evaluation.from_summary(each["test"]["transductive"]) for each in (second, first)]
    assert pair.difference == evaluation.difference(*both, steps=(3, 3)) and pair.difference.low > 0
    assert f"| MAML, first order | 10,000 | 0 | {pair.difference} |" in page.markdown([group])
    assert f"<b>{pair.difference}</b>" in page.html([group], [])


def test_pretraining_has_two_lines_and_a_group_of_images_has_the_name_of_the_data(tmp_path):
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
    assert page.html([group], []).count("<tr><td>") == 3


def test_an_ensemble_has_a_separate_line(tmp_path):
    made_up(tmp_path / "a", "omniglot-5w1s-maml++", ensemble=0.95)
    made_up(tmp_path / "b", "omniglot-5w1s", inductive=0.2)
    (group,) = compare.group([], compare.find([tmp_path]))
    plain, single, together = group.lines
    assert (
        (single.title, together.title) == ("MAML++", "MAML++, ensemble")
        and not together.inductive()
        and plain.inductive()
    )
    assert single.published == together.published == PUBLISHED["omniglot", "5w1s"]["maml++"]
    assert single.published.accuracy == 99.47 and "maml++" not in group.others
    assert [pair.second for pair in group.paired] == [single, together]
    (number,) = together.numbers()
    assert number.accuracy > single.numbers()[0].accuracy and number.inner_steps == single.row.inner_steps
    assert "the best models together, selected" in page.html([group], [])
    assert compare.labels(single.row) == ("transductive", "inductive", "ensemble")


def test_independent_queries_have_one_accuracy(tmp_path):
    made_up(tmp_path / "a", "omniglot-5w1s-norm-tasknorm")
    made_up(tmp_path / "b", "omniglot-5w1s")
    batch, tasknorm = compare.group([], compare.find([tmp_path]))[0].lines
    assert batch.inductive() == [] and tasknorm.inductive() == tasknorm.numbers() != []


def test_the_latest_run_of_each_seed_counts(tmp_path):
    """A run may exist twice, for instance in a work directory and in `results`."""
    made_up(tmp_path / "first", "omniglot-5w1s", accuracy=0.5)
    made_up(tmp_path / "second", "omniglot-5w1s", accuracy=0.9)
    path = tmp_path / "second" / "results.json"
    path.write_text(path.read_text().replace("2026-01-01T02:30:00Z", "2026-01-02T02:30:00Z"))
    made_up(tmp_path / "third", "omniglot-5w1s", seed=1)
    (line,) = compare.group([], compare.find([tmp_path]))[0].lines
    assert [(run.path.name, run.seed) for run in line.runs] == [("second", 0), ("third", 1)]
