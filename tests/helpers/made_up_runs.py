"""Synthetic run directories for the tests of the table of results, and a call of `experiments.reproduce`."""

import json
from pathlib import Path

import numpy as np

from experiments import reproduce
from experiments.few_shot.run import DataSet
from experiments.table.rows import BY_NAME, EXPERIMENTS
from maml_jax.evaluation import Protocol, Results
from maml_jax.runs.files import to_jsonable

ROOT = Path(__file__).parents[2]
DATA = DataSet("made up", None, None, None, {"test": "0123456789abcdef"}, {})


def made_up(path, name, seed=0, steps=60_000, accuracy=0.9, tasks=50, **labels):
    """Writes the directory of a finished run with `tasks` tasks. Queries are correct with probability `accuracy`."""
    row = BY_NAME[name]
    run = EXPERIMENTS[row.experiment](**row.options, row=name, steps=steps, seed=seed).resolved()
    protocol = Protocol("made up", "test", 9, "0123456789abcdef", tasks, seed, run.ways, run.shots,
                        run.queries, "none", 10, 2.0, run.normalisation, "transductive")  # fmt: skip
    count = run.ways * run.queries
    random = np.random.default_rng(seed)
    test = {}
    for label, chance in {"transductive": accuracy, **labels}.items():
        label = label.replace("_", " ")
        columns = 1 if label == "nearest neighbour" else 11
        found = random.binomial(count, chance, (tasks, columns)) / count
        mode = "inductive" if label == "inductive" else "transductive"
        results = Results(protocol._replace(query_mode=mode), found, np.zeros((tasks, columns), bool))
        test[label] = results.summary()
    results = {
        "made_by": {
            "command": "python -m <made & up>",
            "commit": "abc",
            "hardware": "two cores",
            "started": "2026-01-01T00:00:00Z",
            "finished": "2026-01-01T02:30:00Z",
        },
        "row": name,
        **run.description(DATA),
        "selected": {"by": "accuracy on validation tasks", "step": steps - 1},
        "test": test,
    }
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(to_jsonable(results)))
    (path / "run.json").write_text(json.dumps(to_jsonable({"config": run.record(DATA)})))
    return results


def unfinished(path, name, seed=0):
    """Writes the directory of a run that has no results after 1,240 meta-steps; the last row is incomplete."""
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"config": {"row": name, "seed": seed}}))
    (path / "metrics.jsonl").write_text('{"step": 20}\n{"step": 1240}\n{"step": 12')


def start(tmp_path, **options):
    config = reproduce.Config(data_dir=tmp_path, workdir=tmp_path / "work", **options)
    reproduce.main(reproduce.prepare(config))
