"""All processes of a run end if one of them was given other values."""

from contextlib import ExitStack

from helpers.commands import start, wait

SCRIPT = """
import sys
import jax
import numpy as np
import optax
import maml_jax
from pathlib import Path
from maml_jax.parallel import processes
from maml_jax.runs.agreement import DisagreementError
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import resumable_train
from maml_jax.tasks import sinusoid

path, number = Path(sys.argv[1]), int(sys.argv[3])
processes.connect("127.0.0.1:" + sys.argv[2], 2, number)

def report(call):
    try:
        call()
        print("agreed", flush=True)
    except DisagreementError as error:
        print(str(error).partition(". Give")[0], flush=True)

report(lambda: RunDirectory(path / "a", "run", dict(seed=number, data_dir=Path(str(number)))))
jax.config.update("jax_default_prng_impl", ("threefry2x32", "rbg")[number])
report(lambda: RunDirectory(path / "a", "run", dict(seed=0)))
jax.config.update("jax_default_prng_impl", "threefry2x32")
run = RunDirectory(path / "a", "run", dict(seed=0, data_dir=Path(str(number))))

def loss_fn(params, batch):
    x, y = batch
    return ((params["a"] * x - y) ** 2).mean(), dict()

def draw(data, step):
    return sinusoid.draw_tasks(jax.random.fold_in(data[0], step), 2, shots=3, queries=3)

mesh = maml_jax.task_mesh(2)
learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.01, steps=1), optax.sgd(0.1), mesh=mesh)
# Each process holds another part of this array, which is not compared.
divided = processes.put(np.arange(2.0), jax.NamedSharding(mesh, jax.P(mesh.axis_names)))

def train(start=1.0, seed=1, **options):
    options = dict(steps=2, steps_per_call=1, save_every=1) | options
    state = learner.init(dict(a=np.float32(start)))
    trained = resumable_train(learner, state, draw, (jax.random.key(seed), divided), run=run, **options)
    report(lambda: [None for _ in trained])

train(start=number)
train(steps=2 + number)
train(seed=number)
train(labels=dict(method="ab"[number]))
train()
processes.exit_process(0)
"""

EXPECTED = (
    "seed is 1, not 0",
    "jax_default_prng_impl is 'rbg', not 'threefry2x32'",
    "state.params['a'] is 'float32[]",
    "steps is 3, not 2",
    "data[0] is 'key<fry>[]",
    "method is 'b', not 'a'",
)


def test_every_difference_is_named_in_all_processes(tmp_path):
    with ExitStack() as stack:
        both = start(stack, tmp_path / "compiled", 2, 1, "-c", SCRIPT, tmp_path, "{port}", "{process}")
        printed = [child.communicate(timeout=120) for child in both]
    for out, errors in printed:
        found = [line for line in out.splitlines() if line.startswith(("process 1 differs", "agreed"))]
        assert len(found) == len(EXPECTED) + 1, errors
        for line, expected in zip(found, EXPECTED):
            assert line.startswith(f"process 1 differs from process 0: {expected}"), line
        assert found[-1] == "agreed"


def test_commands_with_other_options_end_with_one_message(tmp_path):
    where = "--coordinator 127.0.0.1:{port} --processes {processes} --process {process}".split()
    command = ["-m", "experiments.sinusoid", "--tasks", "4", "--steps", "1{process}", "--workdir", tmp_path / "run"]
    with ExitStack() as stack:
        errors, statuses = wait(start(stack, tmp_path / "compiled", 2, 1, *command, *where))
    assert statuses == [2, 2], errors
    assert all("error: process 1 differs from process 0: steps is 11, not 10. Give all" in text for text in errors)
    assert not (tmp_path / "run").exists()
