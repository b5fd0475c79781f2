"""2D navigation: a policy learns to find goals that it does not observe (paper, section 5.3, figure 4).

    python -m experiments.navigation --methods maml pretrained random oracle

The command trains with the paper's settings, adapts the policies to 40 held-out goals, and prints the returns beside
the paper's. Training takes a few minutes per method on two cores. The command writes metrics, results, parameters and
figures to the work directory.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

import maml_jax
from experiments.reinforcement import evaluation, options, paper, plots
from experiments.reinforcement.evaluation import Trained
from experiments.reinforcement.timer import Timer, earlier_seconds
from experiments.shared import command_line
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.environment import Environment, with_task_observation
from maml_jax.rl.envs.navigation import navigation
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.policy import gaussian_mlp
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.progress import Progress
from maml_jax.runs.resumable import resumable_train

SAVE_EVERY = 5
"""Meta-iterations from one checkpoint to the next."""
SHOWN_GOALS = ((0.4, 0.3), (-0.3, 0.4), (0.1, -0.45), (-0.45, -0.1))
SHOWN_EPISODES = 5

ENVIRONMENT = navigation()

Draw = Callable[[Path, Any, dict[paper.MethodName, Trained], Sequence[dict[str, Any]]], None]
"""`(folder, config, trained policies, rows of results)`: draws the figures of an environment."""


@dataclasses.dataclass(frozen=True)
class Config(options.Config):
    """MAML on 2D navigation. The defaults are the paper's settings (appendix A.2); 20 tasks as in the authors' code.

    The methods 'pretrained' and 'oracle' train on all tasks jointly, with as many episodes in a meta-iteration as
    'maml'. The oracle observes the task. The method 'random' is the untrained policy.
    """


def draw_paths(
    folder: Path, config: Config, trained: dict[paper.MethodName, Trained], rows: Sequence[dict[str, Any]]
) -> None:
    """Draws the paths to four goals, for each method that adapts."""
    for method, policy in trained.items():
        if method != "oracle":
            rates = evaluation.last_rates(rows, method)
            paths, mask = evaluation.sample_episodes(policy, rates, config.test_episodes, SHOWN_GOALS)
            plots.navigation_paths(folder / f"paths-{method}.png", SHOWN_GOALS, paths[:, :, :SHOWN_EPISODES], mask)


def draw_tasks(environment: Environment, tasks: int, key: jax.Array, step: jax.Array) -> Any:
    """Samples the meta-batch of one meta-iteration."""
    return draw_task_batch(environment, jax.random.fold_in(key, step), tasks)


def main(
    config: options.Config, environment: Environment = ENVIRONMENT, draw: Draw = draw_paths, **versions: str
) -> dict[str, Any]:
    """Trains and evaluates every method and seed.

    Args:
      config: the options.
      environment: the environment.
      draw: draws figures of the trained policies.
      **versions: versions of further packages, for the results.

    Returns:
      The content of `results.json`; an empty dict in processes other than 0, which do not evaluate.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    directory = RunDirectory(config.workdir, environment.name, **config.run_options())
    print(f"{config}\nWriting to {directory.path}", flush=True)
    earlier = earlier_seconds(directory.path)
    trained: dict[paper.MethodName, Trained] = {}
    rows: list[dict[str, Any]] = []

    for seed, method in itertools.product(config.seeds, config.methods):
        # Environment and policy. The oracle observes the task.
        family = with_task_observation(environment) if method == "oracle" else environment
        policy = gaussian_mlp(family.observation_size, family.action_size)

        # Learner. Joint training takes as many episodes per meta-iteration as MAML.
        joint = method in ("pretrained", "oracle")
        order: Literal[1, 2] = 1 if method == "first_order" else 2
        sgd = maml_jax.sgd(config.inner_rate, steps=config.inner_steps, order=order)
        learner = maml_rl(
            family,
            policy,
            inner=maml_jax.no_adaptation() if joint else sgd,
            outer=config.outer_step(),
            episodes=config.episodes * (config.inner_steps + 1 if joint else 1),
            inner_loss_name=config.inner_loss,
            gae_lambda=config.gae_lambda,
            sampling_term=config.sampling_term,
            mesh=task_mesh(config.tasks),
        )
        init_key, task_key = jax.random.split(jax.random.key(seed))
        state = learner.init(policy.init(init_key))

        # Training loop. A run that was stopped resumes from its last checkpoint.
        progress, timer = Progress(config.steps, f"{method} (seed {seed})"), Timer()
        if method != "random":
            for state, row in resumable_train(
                learner,
                state,
                partial(draw_tasks, family, config.tasks),
                task_key,
                steps=config.steps,
                steps_per_call=1,
                run=directory,
                save_every=SAVE_EVERY,
                labels={"method": method, "seed": seed},
                rates={"inner": config.inner_rate},
                profile=config.profile,
            ):
                timer.update(row["step"])
                before = {"before": row["return_before"]} if "return_before" in row else {}
                progress.update(row["step"], **before, after=row["return"])

        # Evaluation on held-out tasks.
        trained[method] = Trained(family, policy, processes.local(state), config.inner_loss, config.gae_lambda)
        if processes.is_leader():
            rates = (config.test_rates,) if config.test_rates else paper.rates_at_test(environment.name, method)
            found = evaluation.evaluate(config, trained[method], () if method == "oracle" else rates)
            rows.append({"method": method, "seed": seed, **found})
            rows[-1]["cpu_seconds"] = timer.seconds or earlier.get((method, seed))

    if not processes.is_leader():
        return {}
    results = {
        "environment": environment.name,
        "config": dataclasses.asdict(config),
        "protocol": evaluation.protocol(config, environment),
        "paper": paper.RETURNS[environment.name],
        **versions,
        "rows": rows,
    }
    print(evaluation.table(results))
    params = {method: policy.state.params for method, policy in trained.items()}
    maml_jax.save(directory.path / "params.msgpack", params)
    print(f"Wrote {directory.write_results(results)}, with params.msgpack and the figures in the same folder.")
    plots.returns(directory.path / "returns.png", directory.rows(), rows, paper.RETURNS[environment.name])
    draw(directory.path, config, trained, rows)
    return results


def launch() -> None:
    """Runs the command."""
    command_line.run(Config, partial(options.prepare, defaults=Config()), main, several=True)


if __name__ == "__main__":
    launch()
