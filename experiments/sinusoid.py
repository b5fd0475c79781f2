"""Regression of sine curves from a few points (paper, section 5.1, figures 2 and 3).

    python -m experiments.sinusoid

The command trains five methods: 'maml' by the paper's recipe, 'first_order' MAML, the paper's baselines 'pretrained'
(joint training on all curves) and 'oracle' (joint training with amplitude and phase as inputs), and 'steady'. It adapts
each net to 600 new curves from 5, 10 and 20 points, and prints the squared errors beside the paper's.
"""

import dataclasses
import textwrap
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments.shared import command_line, option_checks, plots
from experiments.shared.command_line import RUN_OPTIONS
from maml_jax import losses, validation
from maml_jax.evaluation import divergence_rate, interval
from maml_jax.nets import models
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.progress import Progress
from maml_jax.runs.resumable import Rate, check_steps, resumable_train
from maml_jax.tasks import sinusoid

TEST_SHOTS = (5, 10, 20)
TEST_STEPS = 10
TEST_QUERIES = 100
TEST_SEED = 600  # The training seeds must differ from this seed.
SHOWN_STEPS = (0, 1, 5, 10)

# The paper's errors for 5 points after 1, 5 and 10 steps (section 5.1, by the tables of the authors' code).
PAPER = {"maml": (0.67, 0.38, 0.35), "pretrained": (2.41, 2.23, 2.19)}

# The nets of joint training are fine-tuned at the best of these rates, chosen on other curves (as in the paper).
FINE_TUNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


MethodName = Literal["maml", "first_order", "pretrained", "oracle", "steady"]


@dataclasses.dataclass(frozen=True)
class Config(command_line.RunOptions):
    """MAML and baselines on sine curves. The defaults are the paper's settings.

    The method 'steady' is MAML by a recipe of our own that keeps losses from diverging: 50 curves per meta-step with 5
    support and 50 query points, weights 0.8 and 0.2 for the losses after one and two inner steps, an outer rate that
    falls from 0.003 to 0, and inner gradients clipped to norm 40. The options --tasks, --shots, --queries,
    --inner-rate, --inner-steps and --outer-rate do not change this recipe.
    """

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
    outer_rate: float = 1e-3
    """Learning rate of Adam in the outer loop."""
    test_tasks: int = 600
    """Number of test curves."""
    methods: tuple[MethodName, ...] = ("steady", "maml", "first_order", "pretrained", "oracle")
    """Methods to train."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings. All seeds have the same test curves."""

    def check(self) -> None:
        """Raises ValueError if an option is not allowed. The message has the option, the value and what is allowed."""
        option_checks.meta_steps("steps", self.steps)
        for name in ("tasks", "shots", "queries", "inner_steps"):
            validation.at_least(name, getattr(self, name), 1)
        validation.at_least("test_tasks", self.test_tasks, 2)  # One curve gives no interval.
        for name in ("inner_rate", "outer_rate"):
            validation.positive(name, getattr(self, name))
        for name in ("methods", "seeds"):
            option_checks.different(name, getattr(self, name))
        for method in self.methods:
            validation.one_of("methods", method, get_args(MethodName))
        if set(self.methods) == {"steady"}:
            for name in ("tasks", "shots", "queries", "inner_rate", "inner_steps", "outer_rate"):
                if (given := getattr(self, name)) != getattr(Config, name):
                    raise ValueError(
                        f"{name} has no effect on the method 'steady', but got {given}: add another method."
                    )
        for seed in self.seeds:
            option_checks.seed("seeds", seed)
            if seed == TEST_SEED:
                raise ValueError(f"seeds must not be {TEST_SEED}, the seed of the test curves.")


class Method(NamedTuple):
    """The settings of a method, in training and at test."""

    title: str
    training: maml_jax.InnerLearner
    outer: optax.GradientTransformation
    tasks: int
    shots: int
    queries: int
    rates: dict[str, Rate]
    """Rates of the training, for the message about a loss that is not finite."""
    test_rates: tuple[float, ...]
    """Candidates for the inner rate at test. The best rate on other curves is used."""
    reveal: bool = False
    """Whether the net gets amplitude and phase."""
    step_weights: tuple[float, ...] | None = None
    """Weights of the query losses before and after each inner step; None to use only the loss after the last step."""
    clip: float | None = None
    """Norm to which inner gradients are clipped, in training and at test."""


def methods(config: Config) -> dict[MethodName, Method]:
    """Returns the settings of all methods. They share the training code and differ in the inner learner."""
    rate, steps = config.inner_rate, config.inner_steps
    paper = {
        "outer": optax.adam(config.outer_rate),
        "rates": {"inner": rate, "outer": config.outer_rate},
        "tasks": config.tasks,
        "shots": config.shots,
        "queries": config.queries,
    }
    falling = optax.cosine_decay_schedule(3e-3, config.steps)
    steady = Config.inner_rate  # Independent of the options, which are for the other methods.
    clipped = maml_jax.unrolled(descent(steady, 40.0), steps=2)
    joint = maml_jax.no_adaptation()
    return {
        "maml": Method("MAML, the paper's recipe", maml_jax.sgd(rate, steps=steps), test_rates=(rate,), **paper),
        "first_order": Method(
            "MAML, first order", maml_jax.sgd(rate, steps=steps, order=1), test_rates=(rate,), **paper
        ),
        "pretrained": Method("pretrained", joint, test_rates=FINE_TUNING_RATES, **paper),
        "oracle": Method("oracle", joint, test_rates=FINE_TUNING_RATES, reveal=True, **paper),
        "steady": Method(
            "MAML, steady recipe",
            clipped,
            optax.adam(falling),
            tasks=50,
            shots=5,
            queries=50,
            rates={"inner": steady, "outer": falling},
            test_rates=(steady,),
            step_weights=(0.0, 0.8, 0.2),
            clip=40.0,
        ),
    }


def descent(rate: float, clip: float | None) -> optax.GradientTransformation:
    """Returns gradient descent, on gradients that are clipped to norm `clip` if it is given."""
    return optax.sgd(rate) if clip is None else optax.chain(optax.clip_by_global_norm(clip), optax.sgd(rate))


net = models.MLP((40, 40), 1)
loss_fn = losses.mean_squared_error(models.apply_params(net))


def meta_train(config: Config, run: RunDirectory, name: MethodName, seed: int) -> maml_jax.MetaState:
    """Trains a net, or resumes the training. Writes metrics and checkpoints to `run`."""
    method = methods(config)[name]
    # For so small a net, one device is faster than several.
    mesh = task_mesh(method.tasks) if processes.multiple() else None
    learner = maml_jax.maml(loss_fn, method.training, method.outer, step_weights=method.step_weights, mesh=mesh)
    init_key, task_key = jax.random.split(jax.random.key(seed))
    state = learner.init(net.init(init_key, jnp.zeros((1, 3 if method.reveal else 1)))["params"])
    draw_tasks = partial(sinusoid.draw_tasks, shots=method.shots, queries=method.queries, reveal=method.reveal)

    def draw(key: jax.Array, step: jax.Array) -> maml_jax.Task:
        return draw_tasks(jax.random.fold_in(key, step), method.tasks)

    progress = Progress(config.steps, f"{name} (seed {seed})")
    for state, row in resumable_train(
        learner, state, draw, task_key, steps=config.steps, steps_per_call=1000, run=run, save_every=5000,
        labels={"method": name, "seed": seed}, rates=method.rates, profile=config.profile,
    ):  # fmt: skip
        progress.update(row["step"], loss=row["loss"])
    return processes.local(state)


def tester(method: Method, rate: float) -> maml_jax.MetaLearner:
    """Returns a meta-learner for adaptation at test, where the order and the outer optimizer have no effect."""
    return maml_jax.maml(loss_fn, maml_jax.unrolled(descent(rate, method.clip), steps=TEST_STEPS), optax.identity())


def evaluate(config: Config, method: Method, state: maml_jax.MetaState, shots: int, key: jax.Array) -> dict:
    """Adapts to the test curves, and returns statistics of their errors after 0 to `TEST_STEPS` steps.

    Of several test rates, the rate with the lowest error on the same number of other curves is used.
    """
    test_key, tuning_key = jax.random.split(key)
    draw = partial(sinusoid.draw_tasks, shots=shots, queries=TEST_QUERIES, reveal=method.reveal)

    def adapted(rate: float, tasks: maml_jax.Task) -> maml_jax.Evaluation:
        return jax.jit(tester(method, rate).evaluate)(state, tasks)

    def final_loss(rate: float) -> float:
        errors = np.asarray(adapted(rate, draw(tuning_key, config.test_tasks)).loss[:, -1], np.float64)
        return float(np.nan_to_num(errors, nan=np.inf, posinf=np.inf).mean())

    rates = method.test_rates
    rate = rates[0] if len(rates) == 1 else min(rates, key=final_loss)
    evaluation = adapted(rate, draw(test_key, config.test_tasks))
    loss = np.nan_to_num(np.asarray(evaluation.loss), nan=np.inf, posinf=np.inf)
    mean, half_width = interval(loss)
    lower, median, upper = np.quantile(loss, (0.25, 0.5, 0.75), axis=0, method="nearest")
    return {
        "rate": rate,
        "mean": mean,
        "half_width": half_width,
        "median": median,
        "quartiles": [lower, upper],
        "divergence": divergence_rate(np.asarray(evaluation.support_loss)),
    }


def mutable_fields(config: Config) -> set[str]:
    """Options that may change when a run is resumed."""
    # Only the schedule of 'steady' depends on the number of steps.
    return {"test_tasks", *RUN_OPTIONS} | ({"steps"} if "steady" not in config.methods else set())


APPENDABLE_FIELDS = ("methods", "seeds")
"""Options that may get further entries when a run is resumed: each entry is a separate training."""


def run_of(config: Config) -> dict[str, Any]:
    """Returns the arguments of `RunDirectory` that describe the run."""
    return {
        "config": dataclasses.asdict(config),
        "mutable_fields": mutable_fields(config),
        "appendable_fields": APPENDABLE_FIELDS,
        "wandb": config.wandb,
    }


def prepare(config: Config) -> Config:
    """Checks the options and the work directory.

    Raises:
      ValueError: if an option is not allowed.
      OSError: if the work directory holds another run, or cannot be written.
    """
    config.check()
    for name in config.methods if processes.multiple() else ():
        task_mesh(methods(config)[name].tasks)  # Raises ValueError if the processes cannot share the tasks.
    RunDirectory.check(config.workdir, **run_of(config))
    check_steps(config.workdir, config.steps)
    return config


def main(config: Config) -> dict:
    """Trains and evaluates every method and seed.

    Returns:
      The content of `results.json`; an empty dict in processes other than 0.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    run = RunDirectory(config.workdir, "sinusoid", **run_of(config))
    titles = ", ".join(methods(config)[name].title for name in config.methods)
    print(f"{config.steps:,} meta-steps of each: {titles}.\nWriting to {run.path}", flush=True)
    test_key = jax.random.key(TEST_SEED)  # The same for all training seeds, and independent of their keys.
    rows: list[dict] = []
    states: dict[MethodName, maml_jax.MetaState] = {}
    for seed in config.seeds:
        for name in config.methods:
            method = methods(config)[name]
            states[name] = meta_train(config, run, name, seed)
            for shots in TEST_SHOTS if processes.is_leader() else ():
                result = evaluate(config, method, states[name], shots, jax.random.fold_in(test_key, shots))
                rows.append({"method": name, "seed": seed, "shots": shots, **result})
    if not processes.is_leader():
        return {}
    results = {
        "config": dataclasses.asdict(config),
        "protocol": (
            f"{config.test_tasks} new curves, mean squared error on {TEST_QUERIES} points of each, after 0 to "
            f"{TEST_STEPS} gradient steps on 5, 10 and 20 points. Intervals are 95% over the curves. A curve counts as "
            "diverged if gradient descent makes its support loss larger."
        ),
        "paper": PAPER,
        "rows": rows,
    }
    print(table(config, results))
    maml_jax.save(run.path / "params.msgpack", {name: state.params for name, state in states.items()})
    path = run.write_results(results)
    last = [row | {"title": methods(config)[row["method"]].title} for row in rows if row["seed"] == config.seeds[-1]]
    plots.sinusoid_errors(run.path / "errors.png", last, PAPER)
    rates = {(row["method"], row["shots"]): row["rate"] for row in rows}
    plots.sinusoid_fits(run.path / "fits.png", fits(config, states, rates))
    print(f"Wrote {path}, with errors.png, fits.png and params.msgpack in the same folder.")
    return results


def fits(
    config: Config, states: dict[MethodName, maml_jax.MetaState], rates: dict[tuple[MethodName, int], float]
) -> list[dict]:
    """Returns predictions for one curve from 5 and from 10 points, before and after 1 and 10 steps (paper, figure 2).

    At most three methods are shown. First-order MAML is shown only if there are fewer than three others.
    """
    shown = sorted(states, key=lambda name: (name in ("first_order", "oracle"), [*states].index(name)))[:3]
    panels = []
    x = jnp.linspace(*sinusoid.INPUTS, 200)[:, None]
    for shots in (5, 10):
        curve_key, example_key = jax.random.split(jax.random.key(2))
        curve = sinusoid.draw_curves(curve_key, 1)
        points = sinusoid.draw_examples(example_key, curve, shots=shots, queries=1)
        support = jax.tree.map(lambda leaf: leaf[0], points.support)
        for name in (name for name in shown if not methods(config)[name].reveal):
            learner = tester(methods(config)[name], rates[name, shots])
            adapted = {steps: learner.adapt(states[name], support, steps)[0] for steps in (0, 1, 10)}
            predictions = {steps: net.apply({"params": params}, x) for steps, params in adapted.items()}
            title = f"{methods(config)[name].title}, {shots} points"
            panels.append({"title": title, "x": x, "truth": curve(x)[0], "support": support, "fits": predictions})
    return panels


def table(config: Config, results: dict) -> str:
    """Formats the errors of every method, seed and number of points, beside the errors of the paper.

    A cell has the mean over the curves and its 95% interval. The cell has the median instead if gradient descent
    diverged on some curves and the mean is not finite, or larger than before adaptation.
    """
    lines, medians = [textwrap.fill(results["protocol"], 110), ""], False
    for shots in TEST_SHOTS:
        heads = ("before", *(f"{s} step{'s' * (s > 1)}" for s in SHOWN_STEPS[1:]))
        lines.append(f"{f'{shots} points':<28}" + "".join(f"{head:>17}" for head in heads) + f"{'diverged':>11}")
        for name in config.methods:
            title = methods(config)[name].title
            mine = [row for row in results["rows"] if row["method"] == name and row["shots"] == shots]
            for row in mine:
                cells = [_cell(row, s) for s in SHOWN_STEPS]
                medians |= any("median" in cell for cell in cells)
                seed = f" (seed {row['seed']})" if len(mine) > 1 else ""
                diverged = "" if methods(config)[name].reveal else f"{row['divergence'][-1]:.1%}"
                lines.append(f"{title + seed:<28}" + "".join(f"{cell:>17}" for cell in cells) + f"{diverged:>11}")
            if shots == 5 and name in PAPER:
                lines.append(f"{'  in the paper':<28}{'':>17}" + "".join(f"{value:>17.2f}" for value in PAPER[name]))
        lines.append("")
    if medians:
        lines.append("median: some curves diverged; the mean is not finite, or larger than before adaptation.\n")
    return "\n".join(lines)


def _cell(row: dict[str, Any], step: int) -> str:
    mean = row["mean"][step]
    if step and not mean <= max(row["mean"][0], 1.0) and row["divergence"][step]:
        return f"median {row['median'][step]:.2f}"
    return f"{mean:.2f} ± {row['half_width'][step]:.2f}"


if __name__ == "__main__":
    command_line.run(Config, prepare, main, several=True, small=True)
