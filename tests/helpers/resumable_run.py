"""A short training for the tests that end a process: `python tests/helpers/resumable_run.py WORKDIR STEPS [hang]`.

The script prints the step of each row. With the arguments `WORKDIR STEPS PORT PROCESSES PROCESS`, it is one of several
processes, which train in float32 and then in float64.
"""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from maml_jax import losses
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.resumable import Validate, resumable_train
from maml_jax.tasks import sinusoid

STEPS_PER_CALL, SAVE_EVERY = 2, 6
TASKS = 4
"""Tasks per meta-step of the training in several processes."""


def setting(num_tasks=3, mesh=None, dtype=np.float32):
    """Returns learner, initial state and `draw`. The inner rates are learned; the outer optimizer is Adam with clipping
    and a schedule."""
    params = {"in": np.linspace(-2, 2, 8, dtype=dtype), "out": np.linspace(1, -1, 8, dtype=dtype)}
    learner = maml_jax.maml(
        losses.mean_squared_error(lambda params, x: jnp.tanh(x * params["in"]) @ params["out"][:, None]),
        maml_jax.sgd(0.01, steps=2, learn_rates="parameter"),
        optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(0.03, 1000))),
        mesh=mesh,
    )

    def draw(key, step):
        return sinusoid.draw_tasks(jax.random.fold_in(key, step), num_tasks, shots=4, queries=4)

    return learner, learner.init(params), draw


def open_run(path, steps=0):
    """The run directory of this training."""
    return RunDirectory(path, "tiny", {"steps": steps}, mutable_fields={"steps"})


def train_in(run, steps, *, until=None, **options):
    """Trains in this process, and leaves the loop at step `until`. Returns the state and the rows."""
    learner, state, draw = setting()
    options = {"steps_per_call": STEPS_PER_CALL, "save_every": SAVE_EVERY} | options
    rows = []
    for state, row in resumable_train(learner, state, draw, jax.random.key(1), steps=steps, run=run, **options):
        rows.append(row)
        if row["step"] == until:
            break
    return state, rows


def train_in_both_types(run, steps, mesh, on_row=lambda dtype, row: None):
    """Trains in float32 and then in float64, with the tasks divided over `mesh`. Returns the parameters of both."""
    params = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            learner, state, draw = setting(TASKS, mesh, dtype)
            for state, row in resumable_train(
                learner, state, draw, jax.random.key(1), steps=steps, steps_per_call=STEPS_PER_CALL, run=run,
                save_every=SAVE_EVERY, labels={"dtype": dtype},
            ):  # fmt: skip
                on_row(dtype, row)
            params[dtype] = jax.tree.map(np.asarray, state.params)
    return params


def run_process(workdir, steps, port, num_processes, process):
    """Trains as one of several processes. Every process prints its steps, and process 0 writes the parameters."""
    processes.connect(f"127.0.0.1:{port}", num_processes, process)
    run = RunDirectory(workdir, "shared", {"steps": steps})
    params = train_in_both_types(run, steps, task_mesh(TASKS), lambda dtype, row: print(dtype, row["step"], flush=True))
    if processes.is_leader():
        arrays = {f"{name} {dtype}": leaf for dtype in params for name, leaf in params[dtype].items()}
        np.savez(run.path / "params", **arrays)


def hang(_):
    """Blocks the main thread in a compiled program that never ends."""
    print("hanging", flush=True)
    return {"never": float(jax.jit(lambda x: jax.lax.while_loop(lambda y: y < 2.0, jnp.sin, x))(1.0))}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Background jobs of a shell ignore SIGINT.
    workdir, steps = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 4:
        run_process(workdir, steps, *map(int, sys.argv[3:]))
        sys.exit()
    learner, state, draw = setting()
    run = open_run(workdir, steps)
    validate = Validate(SAVE_EVERY, hang) if "hang" in sys.argv else None
    for state, row in resumable_train(
        learner, state, draw, jax.random.key(1), steps=steps, steps_per_call=STEPS_PER_CALL, run=run,
        save_every=SAVE_EVERY, validate=validate,
    ):  # fmt: skip
        print(row["step"], flush=True)
