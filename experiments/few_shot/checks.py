"""Checks of the options of a resolved few-shot run."""

from typing import Any, get_args

from experiments.few_shot.names import ANNEALED, WITH_HEAD_RATES, WITHOUT_ORDER, Net, Optimizer
from experiments.shared import option_checks
from maml_jax import validation
from maml_jax.nets.normalisation import NORMALISATIONS
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.tasks.episodes import ROTATIONS


def check(run: Any) -> None:
    """Raises ValueError if an option of a resolved `experiments.few_shot.run.Run` is not allowed."""
    validation.at_least("ways", run.ways, 2)
    validation.at_least("train_ways", run.train_ways, 2)
    counts = ("shots", "queries", "train_shots", "train_queries", "tasks", "inner_steps", "downscale", "test_tasks")
    for name in counts:
        validation.at_least(name, getattr(run, name), 1)
    option_checks.meta_steps("steps", run.steps)
    if run.first_steps is not None:
        option_checks.meta_steps("first_steps", run.first_steps)
    option_checks.seed("seed", run.seed)
    for name in ("inner_rate", "outer_rate", *(("clip",) if run.clip is not None else ())):
        validation.positive(name, getattr(run, name))
    for rate in run.head_rates:
        validation.positive("head_rates", rate)
    for name, allowed in (
        ("optimizer", get_args(Optimizer)),
        ("net", get_args(Net)),
        ("order", (1, 2)),
        ("normalisation", NORMALISATIONS),
        ("rotations", ROTATIONS),
        ("evaluation", ("transductive", "both")),
    ):
        validation.one_of(name, getattr(run, name), allowed)
    _check_combinations(run)
    if processes.multiple():
        task_mesh(run.tasks)  # Raises ValueError if the processes cannot have equal shares.
    if run.task_batch_size is not None:
        validation.at_least("task_batch_size", run.task_batch_size, 1)
        mesh = task_mesh(run.tasks)
        share = run.tasks // (mesh.size if mesh else 1)
        if share % run.task_batch_size:
            raise ValueError(
                f"task_batch_size must divide the tasks of one device, {share}, but got {run.task_batch_size}."
            )


def _check_combinations(run: Any) -> None:
    if run.net == "mlp" and run.normalisation in ("instance", "tasknorm"):
        raise ValueError(
            f"normalisation {run.normalisation!r} needs spatial axes, which the fully connected net does not "
            "have: give 'batch', 'support', 'layer' or 'group'."
        )
    if run.normalisation == "running" and run.method == "pretrained":
        raise ValueError(
            "normalisation 'running' gathers statistics over the inner steps of training, but pretrained takes no "
            "inner steps in training: give another normalisation."
        )
    if run.normalisation == "running" and run.method == "reptile":
        raise ValueError(
            "normalisation 'running' needs norm parameters that the inner steps leave unchanged, but reptile "
            "adapts them: give another normalisation."
        )
    if run.rotations == "classes" and run.method == "pretrained":
        raise ValueError(
            "rotations 'classes' makes four classes of each class, but pretrained has one label for each class of the "
            "data: give 'random' or 'none'."
        )
    _check_one_step(run)
    if run.tune and run.method != "pretrained":
        raise ValueError(f"tune is for the method pretrained, but got {run.method}.")
    if run.order == 1 and run.method in WITHOUT_ORDER:
        raise ValueError(f"order 1 is for methods that differentiate the inner loop, but got {run.method}.")
    if run.anneal and run.method in ANNEALED:
        raise ValueError(
            f"anneal is for methods with a constant outer rate, but the outer rate of {run.method} always falls."
        )
    if run.optimizer == "muon" and run.method == "reptile":
        raise ValueError("optimizer 'muon' cannot be given for reptile, whose outer optimizer is SGD.")
    if run.method not in WITH_HEAD_RATES:
        for name in ("head_rates", "learn_rates"):
            if value := getattr(run, name):
                raise ValueError(
                    f"{name} is for the methods {' and '.join(WITH_HEAD_RATES)}, but got {value} for {run.method}."
                )
    if len(run.head_rates) > run.inner_steps:
        raise ValueError(
            f"head_rates must be at most {run.inner_steps} rates, one for each inner step, but got "
            f"{' '.join(map(str, run.head_rates))}."
        )


def _check_one_step(run: Any) -> None:
    if run.method != "one-step":
        for name, neutral in (("train_ways", run.ways), ("downscale", 1)):
            if (value := getattr(run, name)) != neutral:
                raise ValueError(f"{name} is for the method one-step, but got {value} for {run.method}.")
        return
    if run.inner_steps != 1:
        raise ValueError(f"inner_steps must be 1 for the method one-step, but got {run.inner_steps}.")
    if run.train_queries % run.train_shots:
        raise ValueError(
            f"train_queries must be a multiple of train_shots for the method one-step, but got "
            f"{run.train_queries} and {run.train_shots}."
        )
    height, width, _ = run.image_shape
    if height % run.downscale or width % run.downscale:
        raise ValueError(f"downscale must divide the size of the images, {height}x{width}, but got {run.downscale}.")
    if run.downscale > 1 and run.net == "mlp":
        raise ValueError(f"downscale is for the convolutional net, but got {run.downscale} for net {run.net!r}.")
