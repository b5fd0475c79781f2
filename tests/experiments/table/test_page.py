"""The HTML page and the Markdown tables show all accuracies, their protocols, and missing results."""

import json
import re

import numpy as np
import pytest
from helpers.made_up_runs import made_up, unfinished

from experiments.table import compare, page, rows
from maml_jax.evaluation import Protocol


@pytest.fixture
def rendered(tmp_path):
    """Page and tables of four rows, with two seeds, two schedules, an unfinished run and a row without a run."""
    runs = tmp_path / "runs"
    seeds = [made_up(runs / f"a{seed}", "omniglot-5w1s", seed, 10_000, inductive=0.2) for seed in (0, 1)]
    full = made_up(runs / "b", "omniglot-5w1s-order1", 0, 60_000)
    made_up(runs / "c", "omniglot-5w1s-order1", 0, 10_000, accuracy=0.5)
    unfinished(runs / "d", "omniglot-5w1s-anil")
    groups = compare.group(rows.choose(["omniglot-5w1s", "omniglot-5w1s-[ab][no]i*"]), compare.find([runs]))
    assert [group.title for group in groups] == ["Omniglot, 5-way 1-shot"]
    return seeds, full, page.html(groups, []), page.markdown(groups)


def test_every_accuracy_is_shown_beside_the_published(rendered):
    seeds, full, text, table = rendered
    means = [each["test"]["transductive"]["accuracy"][3] for each in seeds]
    of_seeds = f"{np.mean(means):.2f} ({min(means):.2f} to {max(means):.2f}, 2 seeds)"
    alone = full["test"]["transductive"]
    single = f"{alone['accuracy'][3]:.2f} ± {alone['half_width'][3]:.2f}"
    assert of_seeds in text and single in text and "98.7 ± 0.4" in text and rows.FINN in text
    published = "98.7 ± 0.4 | Finn et al. 2017, table 1"
    assert f"| Omniglot, 5-way 1-shot | {of_seeds} | {published} | 10,000 of 60,000 |" in table  # The summary.
    assert f"| {single} |  | 3 | 60,000 | 98.3 ± 0.5 " in table
    inductive = [each["test"]["inductive"]["accuracy"][3] for each in seeds]
    assert f"| {of_seeds} | {np.mean(inductive):.2f} (" in table


def test_protocols_and_provenance_are_shown(rendered):
    seeds, _, text, table = rendered
    for found in seeds:
        for mode in ("transductive", "inductive"):
            protocol = str(Protocol(**found["test"][mode]["protocol"]))
            assert f"after 3 inner steps; {protocol}" in text
    assert "a1: 2.50 hours, two cores, commit abc, 2026-01-01; the model of meta-step 9,999" in text
    assert "| Omniglot, 5-way 1-shot | test, 9 classes, 0123456789ab | 50 | 0, 1 | 1 | none |" in table
    assert "| `a1` | MAML, second order | 1 | 2 | 9,999 | 2.50 | two cores | abc | 2026-01-01 |" in table


def test_missing_results_are_listed(rendered):
    *_, text, table = rendered
    assert "| ANIL |  |  | 3 | 1,240 of 60,000 |  |" in table and "| BOIL |  |  | 3 | 0 of 60,000 |  |" in table
    for each in (text, table):
        missing = each[each.index("Rows without the full schedule") :]
        assert "omniglot-5w1s: 10,000 of 60,000 meta-steps" in missing
        assert "omniglot-5w1s-anil: in training, 1,240 of 60,000 meta-steps" in missing
        assert "omniglot-5w1s-boil: not started, 60,000 meta-steps" in missing
        assert "order1" not in missing  # This row has a result of the full schedule.
    assert "4 rows: 1 with the full schedule, 1 with a shorter schedule, 2 without a result." in text


def test_the_page_needs_no_other_file(rendered):
    """The only plot is embedded in the page."""
    assert re.findall(r'(?:src|href)="([^"]{0,22})', rendered[2]) == ["data:image/png;base64,"]


def test_runs_that_belong_to_no_row_are_listed(tmp_path):
    made_up(tmp_path / "run", "omniglot-5w1s")
    (run,) = compare.find([tmp_path])
    assert "&lt;made &amp; up&gt;" in page.html(compare.group([], []), [run._replace(row=None)])


def test_only_the_text_between_the_marks_changes():
    text = page.with_region("Before. <a>old</a> After.", "new", "<a>", "</a>")
    assert text == "Before. <a>new</a> After."
    for wrong in ("no marks", "</a><a>", "<a></a><a></a>"):
        with pytest.raises(ValueError, match="once each"):
            page.with_region(wrong, "new", "<a>", "</a>")


def test_texts_of_results_are_not_read_as_html(tmp_path):
    made_up(tmp_path / "a", "omniglot-5w1s", 0, 60_000)
    made_up(tmp_path / "<script>b", "omniglot-5w1s", 1, 60_000)
    for path in sorted(tmp_path.glob("*/results.json")):
        content = json.loads(path.read_text())
        content["made_by"] |= {"hardware": "<script>", "commit": "<script>"}
        content["test"]["transductive"]["protocol"] |= {"data": "<script>", "split": "<script>"}
        path.write_text(json.dumps(content))
    runs = [run._replace(seed=f"<script>{run.seed}") for run in compare.find([tmp_path])]  # As if not checked.
    text = page.html(compare.group([], runs), runs)
    assert "seed &lt;script&gt;1: " in text and "<script>" not in text
