"""What the tests of the table share: directories as runs leave them, and the program over them."""

import json
from pathlib import Path

import numpy as np

from experiments import reproduce
from experiments.few_shot import options as few_shot
from experiments.table import rows
from maml_jax.evaluation import Protocol, Results

ROOT = Path(__file__).parents[2]
BY_NAME = {row.name: row for row in rows.ROWS}


def as_json(tree):
    return json.dumps(tree, default=lambda leaf: leaf.tolist() if hasattr(leaf, "tolist") else str(leaf))


def made_up(path, name, seed=0, steps=60_000, accuracy=0.9, tasks=50, **labels):
    """A directory as a run leaves it: `tasks` tasks, of which every query is right with that chance."""
    row = BY_NAME[name]
    module = rows.EXPERIMENTS[row.experiment]
    config, setting = module.settle(module.Config(**row.options, steps=steps, seed=seed))
    told = Protocol("made up", "test", 9, "0123456789abcdef", tasks, seed, setting.ways, setting.shots,
                    setting.queries, "none", 10, 2.0, config.normalisation, "together")  # fmt: skip
    count = setting.ways * setting.queries
    random = np.random.default_rng(seed)
    test = {}
    for label, chance in {"queries together": accuracy, **labels}.items():
        label = label.replace("_", " ")
        columns = 1 if label == "nearest neighbour" else 11
        found = random.binomial(count, chance, (tasks, columns)) / count
        protocol = told._replace(query_mode="one by one" if label.endswith("one by one") else "together")
        test[label] = Results(protocol, found, np.zeros((tasks, columns), bool)).summary()
    results = {
        "made_by": {
            "command": "python -m <made & up>",
            "commit": "abc",
            "hardware": "two cores",
            "started": "2026-01-01T00:00:00Z",
            "finished": "2026-01-01T02:30:00Z",
        },
        "experiment": row.experiment,
        "config": {name: value for name, value in vars(config).items() if name not in few_shot.PLACES},
        "setting": vars(setting),
        "selected": {"by": "accuracy on validation tasks", "step": steps - 1},
        "test": test,
    }
    path.mkdir(parents=True)
    (path / "results.json").write_text(as_json(results))
    (path / "run.json").write_text(as_json({"config": few_shot.recorded(config, setting)}))
    return results


def start(tmp_path, **options):
    config = reproduce.Config(data_dir=tmp_path, workdir=tmp_path / "work", **options)
    reproduce.main(reproduce.prepare(config))
