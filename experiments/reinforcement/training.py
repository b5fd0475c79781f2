"""Training of policies by what the options name, and the whole experiment: training, evaluation, results."""

import dataclasses
import time
from typing import Any, Literal

import jax
import optax

import maml_jax
from experiments.reinforcement.options import Config, MethodName, Prepared, Setting, adam_rate, run_of
from experiments.reinforcement.testing import TEST_STEPS, Trained, evaluate, table
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.environment import told
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.outer import Outer, policy_gradient, promp
from maml_jax.rl.policy import gaussian_mlp
from maml_jax.rl.trust_region import trpo
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import read_json
from maml_jax.runs.progress import Progress
from maml_jax.runs.resumable import resumable_train

SAVE_EVERY = 5


def outer(config: Config, setting: Setting) -> Outer:
    """The outer step that the options name."""
    if config.outer == "trpo":
        return trpo(setting.kl_limit, curvature_tasks=config.curvature_tasks)
    return (policy_gradient if config.outer == "policy_gradient" else promp)(optax.adam(adam_rate(config)))


def meta_train(prepared: Prepared, run: RunDirectory, method: MethodName, seed: int) -> Trained:
    """Trains one policy, from where `run` has come with it."""
    config, problem, setting = prepared
    environment = told(problem.environment) if method == "oracle" else problem.environment
    policy = gaussian_mlp(environment.observation_size, environment.action_size)
    joint = method in ("pretrained", "oracle")
    order: Literal[1, 2] = 1 if method == "first_order" else 2
    learner = maml_rl(
        environment,
        policy,
        maml_jax.no_adaptation() if joint else maml_jax.sgd(setting.inner_rate, steps=config.inner_steps, order=order),
        outer(config, setting),
        episodes=setting.episodes * (config.inner_steps + 1 if joint else 1),
        inner_loss_name=config.inner_loss,
        sampling_term=config.sampling_term,
        mesh=task_mesh(setting.tasks),
    )
    init_key, trial_key = jax.random.split(jax.random.key(seed))
    state = learner.init(policy.init(init_key))
    if method == "random":
        return Trained(environment, policy, processes.local(state), config.inner_loss)

    def draw(key: jax.Array, step: jax.Array) -> Any:
        return draw_task_batch(environment, jax.random.fold_in(key, step), setting.tasks)

    progress = Progress(setting.steps, f"{method} (seed {seed})")
    cpu_seconds, begun, handed_over = None, None, 0
    for state, row in resumable_train(
        learner,
        state,
        draw,
        trial_key,
        steps=setting.steps,
        steps_per_call=1,
        run=run,
        save_every=SAVE_EVERY,
        labels={"method": method, "seed": seed},
        rates={"inner": setting.inner_rate},
        profile=config.profile,
    ):
        before = {"before": row["return_before"]} if "return_before" in row else {}
        progress.update(row["step"], **before, after=row["return"])
        handed_over += 1
        if handed_over == 2:  # The first is compiled for, or is what was restored; then the second is compiled for.
            begun = (row["step"], time.process_time())
        elif begun and (taken := row["step"] - begun[0]) >= 9:
            cpu_seconds = (time.process_time() - begun[1]) / taken
    return Trained(environment, policy, processes.local(state), config.inner_loss, cpu_seconds)


def run(
    prepared: Prepared, **about: Any
) -> tuple[RunDirectory, dict[str, Any], list[dict[str, Any]], dict[MethodName, Trained]] | None:
    """Trains and tests what the options name, and writes parameters and results, with what else is given.

    Returns:
      The run's directory, its results, the metrics of every meta-iteration, and the last seed's policies; in process 0,
      which alone tests.
    """
    config, problem, setting = prepared
    directory = RunDirectory(config.workdir, problem.environment.name, **run_of(config, setting))
    former = directory.path / "results.json"
    known = read_json(former)["rows"] if processes.is_leader() and former.exists() else []
    costs = {(row["method"], row["seed"]): row["cpu_seconds"] for row in known}
    print(f"{config}\n{setting}\nWriting to {directory.path}", flush=True)
    rows: list[dict[str, Any]] = []
    policies: dict[MethodName, Trained] = {}

    for seed in config.seeds:
        for method in config.methods:
            policies[method] = meta_train(prepared, directory, method, seed)
            if processes.is_leader():
                row = {"method": method, "seed": seed, **evaluate(prepared, method, policies[method])}
                if row["cpu_seconds"] is None:  # Nothing was left to be trained.
                    row["cpu_seconds"] = costs.get((method, seed))
                rows.append(row)
    if not processes.is_leader():
        return None
    results = {
        "config": dataclasses.asdict(config),
        "setting": setting._asdict(),
        "protocol": (
            f"{problem.environment.name}: mean return over {config.test_tasks} held-out tasks before and after 1 to "
            f"{TEST_STEPS} gradient steps, each on {setting.test_episodes} new episodes of at most "
            f"{problem.environment.horizon} time steps, by the rates shown (of the first and of later gradient steps); "
            "intervals are 95% over the tasks"
        ),
        "paper": problem.paper,
        **about,
        "rows": rows,
    }
    print(table(results))
    params = {method: trained.state.params for method, trained in policies.items()}
    maml_jax.save(directory.path / "params.msgpack", params)
    path = directory.write_results(results)
    print(f"Wrote {path}, and params.msgpack beside it.")
    return directory, results, directory.rows(), policies
