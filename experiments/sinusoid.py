"""Regression of sine curves from a few points (paper, section 5.1, figures 2 and 3).

    python -m experiments.sinusoid

Trains MAML, its first-order approximation and the paper's two baselines: a net trained on all curves
together ('pretrained'), and one that is told amplitude and phase ('oracle'). Then adapts them to 600
new curves from 5, 10 and 20 points, and prints the mean squared errors beside the paper's.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments import command_line
from maml_jax import losses, models, plots, validation
from maml_jax.record import Progress, RunDirectory
from maml_jax.statistics import divergence_rate, interval
from maml_jax.tasks import sinusoid
from maml_jax.train import train

TEST_SHOTS = (5, 10, 20)
TEST_STEPS = 10
TEST_QUERIES = 100
SHOWN_STEPS = (0, 1, 5, 10)

# The paper's errors for 5 points after 1, 5 and 10 steps (section 5.1, by the tables of the authors' code).
PAPER = {"maml": (0.67, 0.38, 0.35), "pretrained": (2.41, 2.23, 2.19)}

# The pretrained net is fine-tuned at the best of these rates, found on other curves (the paper tunes it too).
FINE_TUNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


@dataclasses.dataclass(frozen=True)
class Config:
    """MAML on sine curves, by the paper's recipe."""

    steps: int = 70_000
    """Meta-steps of each method."""
    tasks: int = 25
    """Curves per meta-step."""
    shots: int = 10
    """Support points per curve in training."""
    queries: int = 10
    """Query points per curve in training."""
    inner_rate: float = 0.01
    """Inner step size for the mean squared error."""
    inner_steps: int = 1
    """Inner steps in training."""
    inner_clip: float | None = None
    """Not in the paper: scale inner gradients down to this norm, in training and at test. It stops divergence."""
    outer_rate: float = 1e-3
    """Adam's rate in the outer loop."""
    test_tasks: int = 600
    """Curves to evaluate on."""
    seeds: tuple[int, ...] = (0,)
    """One whole run for each; the test curves are the same."""
    workdir: Path | None = None
    """Where the run writes; default: a new directory below runs/."""

    def check(self) -> None:
        """Raises ValueError, naming the option, what was given and what is allowed."""
        for name in ("steps", "tasks", "shots", "queries", "inner_steps", "test_tasks"):
            validation.at_least(name, getattr(self, name), 1)
        for name in ("inner_rate", "outer_rate"):
            validation.positive(name, getattr(self, name))
        if self.inner_clip is not None:
            validation.positive("inner_clip", self.inner_clip)
        if not self.seeds:
            raise ValueError("seeds must name at least one seed, but got none.")
        for seed in self.seeds:
            validation.at_least("seeds", seed, 0)


class Method(NamedTuple):
    """One row of the table."""

    title: str
    training: maml_jax.InnerLearner
    """The inner learner in training."""
    fine_tuning_rates: tuple[float, ...]
    """Inner rates at test: the best on other curves is taken."""
    told: bool = False
    """Whether the net gets amplitude and phase."""


def methods(config: Config) -> dict[str, Method]:
    """What is compared: four nets trained by the same code, with different inner learners."""
    return {
        "maml": Method("MAML", inner(config, config.inner_rate, 2), (config.inner_rate,)),
        "first_order": Method("MAML, first order", inner(config, config.inner_rate, 1), (config.inner_rate,)),
        "pretrained": Method("pretrained", maml_jax.no_adaptation(), FINE_TUNING_RATES),
        "oracle": Method("oracle", maml_jax.no_adaptation(), (config.inner_rate,), told=True),
    }


def inner(config: Config, rate: float, order: Literal[1, 2]) -> maml_jax.InnerLearner:
    """Gradient descent at `rate`, clipped if so configured."""
    if config.inner_clip is None:
        return maml_jax.sgd(rate, steps=config.inner_steps, order=order)
    clipped = optax.chain(optax.clip_by_global_norm(config.inner_clip), optax.sgd(rate))
    return maml_jax.unrolled(clipped, steps=config.inner_steps, order=order)


net = models.MLP((40, 40), 1)
loss_fn = losses.mean_squared_error(models.apply_params(net))


def meta_train(config: Config, method: Method, key: jax.Array, run: RunDirectory, name: str) -> maml_jax.MetaState:
    """Trains one method; logs to `run`."""
    learner = maml_jax.maml(loss_fn, method.training, optax.adam(config.outer_rate))
    init_key, task_key = jax.random.split(key)
    state = learner.init(net.init(init_key, jnp.zeros((1, 3 if method.told else 1)))["params"])

    def draw(key: jax.Array, step: jax.Array) -> maml_jax.Task:
        key = jax.random.fold_in(key, step)
        return sinusoid.draw_tasks(
            key, config.tasks, shots=config.shots, queries=config.queries, reveal=method.told
        )  # fmt: skip

    progress = Progress(config.steps, name)
    for state, metrics in train(learner, state, draw, task_key, steps=config.steps, steps_per_call=1000):
        run.log(method=name, **metrics)
        progress.update(metrics["step"], loss=metrics["loss"])
    return state


def evaluate(config: Config, method: Method, state: maml_jax.MetaState, shots: int, key: jax.Array) -> dict:
    """Adapts to the test curves. The rate, where there is a choice, is chosen on as many other curves."""
    test_key, tuning_key = jax.random.split(key)
    draw = partial(sinusoid.draw_tasks, shots=shots, queries=TEST_QUERIES, reveal=method.told)

    def adapted(rate: float, tasks: maml_jax.Task) -> maml_jax.Evaluation:
        learner = maml_jax.maml(loss_fn, inner(config, rate, 2), optax.identity())
        evaluation = jax.jit(learner.evaluate, static_argnums=2)(state, tasks, TEST_STEPS)
        return evaluation

    def final_loss(rate: float) -> float:
        return float(np.nan_to_num(adapted(rate, draw(tuning_key, config.test_tasks)).loss[:, -1], nan=np.inf).mean())

    rates = method.fine_tuning_rates
    rate = rates[0] if len(rates) == 1 else min(rates, key=final_loss)
    evaluation = adapted(rate, draw(test_key, config.test_tasks))
    mean, half_width = interval(np.asarray(evaluation.loss))
    return {
        "rate": rate,
        "mean": mean,
        "half_width": half_width,
        "median": np.median(evaluation.loss, 0),
        "divergence": divergence_rate(np.asarray(evaluation.support_loss)),
    }


def main(config: Config) -> dict:
    """Runs the experiment; returns what it writes to `results.json`."""
    config.check()
    run = RunDirectory(config.workdir, "sinusoid")
    print(f"{config}\nWriting to {run.path}", flush=True)
    test_key = jax.random.key(600)  # Apart from every training seed's keys, and the same for all of them.
    rows, states = [], {}
    for seed in config.seeds:
        for name, method in methods(config).items():
            title = name if len(config.seeds) == 1 else f"{name} (seed {seed})"
            states[name] = meta_train(config, method, jax.random.key(seed), run, title)
            for shots in TEST_SHOTS:
                result = evaluate(config, method, states[name], shots, jax.random.fold_in(test_key, shots))
                rows.append({"method": name, "seed": seed, "shots": shots, **result})
    results = {
        "config": dataclasses.asdict(config),
        "protocol": (
            f"{config.test_tasks} new curves, mean squared error on {TEST_QUERIES} points of each, after 0 to "
            f"{TEST_STEPS} gradient steps on K points; intervals are 95% over the curves; a curve counts as diverged "
            "where gradient descent has made its support loss larger"
        ),
        "paper": PAPER,
        "rows": rows,
    }
    print(table(config, results))
    run.write_params({name: state.params for name, state in states.items()})
    path = run.write_results(results)
    plots.sinusoid_errors(run.path / "errors.png", [row for row in rows if row["seed"] == config.seeds[-1]], PAPER)
    plots.sinusoid_fits(run.path / "fits.png", fits(config, states))
    print(f"Wrote {path}, and errors.png, fits.png and params.msgpack beside it.")
    return results


def fits(config: Config, states: dict[str, maml_jax.MetaState]) -> list[dict]:
    """Predictions for one curve from 5 and from 10 points, before and after 1 and 10 steps (paper, figure 2)."""
    panels = []
    x = jnp.linspace(*sinusoid.INPUTS, 200)[:, None]
    for shots in (5, 10):
        curve_key, example_key = jax.random.split(jax.random.key(2))
        curve = sinusoid.draw_curves(curve_key, 1)
        points = sinusoid.draw_examples(example_key, curve, shots=shots, queries=1)
        support = jax.tree.map(lambda leaf: leaf[0], points.support)
        for name in ("maml", "pretrained"):
            panel = {"title": f"{name}, K = {shots}", "x": x, "truth": curve(x)[0], "support": support, "fits": {}}
            for steps in (0, 1, 10):
                params = states[name].params
                if steps:
                    params, _ = maml_jax.adapt(loss_fn, params, support, learning_rate=config.inner_rate, steps=steps)
                panel["fits"][steps] = net.apply({"params": params}, x)
            panels.append(panel)
    return panels


def table(config: Config, results: dict) -> str:
    """Mean errors of every method, seed and number of points, the paper's beside."""
    lines = [results["protocol"], ""]
    for shots in TEST_SHOTS:
        lines.append(f"K = {shots:<12} rate  seed" + "".join(f"{f'{s} steps':>16}" for s in SHOWN_STEPS))
        lines[-1] += "   median after 10   diverged after 10"
        for name, method in methods(config).items():
            mine = [row for row in results["rows"] if row["method"] == name and row["shots"] == shots]
            for row in mine:
                cells = "".join(f"{row['mean'][s]:9.3f} +-{row['half_width'][s]:.3f}" for s in SHOWN_STEPS)
                lines.append(
                    f"{method.title:<17} {row['rate']:<6g}{row['seed']:>3} {cells}{row['median'][-1]:16.3f}"
                    f"{row['divergence'][-1]:19.2%}"
                )
            if len(mine) > 1:
                medians = np.median([row["mean"] for row in mine], 0)
                lines.append(f"{'  median of seeds':<27} " + "".join(f"{medians[s]:9.3f}       " for s in SHOWN_STEPS))
            if shots == 5 and name in PAPER:
                values = "".join(f"{value:9.2f}       " for value in PAPER[name])
                lines.append(f"{'  the paper':<27} {'':16}{values}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(Config, main)
