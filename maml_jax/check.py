"""Checks whether the meta-gradient of a model and a loss is exact.

A meta-gradient can be wrong without any error message. Causes are a `stop_gradient` in the loss, an operation with a
wrong second derivative, or a compiler error. Training still runs, but learns less. `check_meta_gradient` compares the
meta-gradient with finite differences of the meta-loss, and with the meta-gradient without compilation and without
`vmap`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import diagnosis, validation
from maml_jax.autodiff.finite_differences import (
    Comparison,
    GradientChecker,
    cast,
    gradient_checker,
    leaf_names,
    norm,
    random_direction,
    relative_difference,
)
from maml_jax.checked_problem import Problem
from maml_jax.inner import InnerLearner
from maml_jax.meta import StepWeights, task_loss
from maml_jax.types import LossFn, Params, Task

PERTURBATION = 1e-3
"""Standard deviation of the random step away from the given parameters. Without this step, a ReLU with bias zero and an
input of zeros is at its kink and has no derivative."""

LARGE_ROUNDING = 0.05
"""Relative change of the meta-gradient in float32 above which the report suggests remedies."""

SMALL_CHANGE = 1e-12
"""Relative change of the meta-parameters that measures how much the inner loop amplifies changes."""

LARGE_AMPLIFICATION = 1e4
"""Amplification above which the report names it."""


class Finding(NamedTuple):
    """One comparison."""

    name: str
    """Name of the comparison, as listed for `check_meta_gradient`."""
    error: float
    """Relative difference of the two compared values; NaN if one of them is not finite."""
    limit: float
    """Largest error that counts as agreement; infinite for a finding that is information only."""
    meaning: str
    """What the finding says about the model and the loss, and what to do if it failed."""

    @property
    def passed(self) -> bool:
        """Whether the values agree. Always True for a finding that is information only."""
        return bool(self.error <= self.limit) or self.limit == float("inf")

    def __str__(self) -> str:
        if not self.passed:
            status = "FAIL"
        else:
            status = "info" if self.limit == float("inf") else "ok"
        error = "" if self.limit == 0 else f"{self.error:.1e}"
        limit = "" if self.limit in (0, float("inf")) else f" (limit {self.limit:.0e})"
        return f"{status:>4}  {self.name}: {error}{limit}{'. ' if error else ''}{self.meaning}"


class MetaGradientReport(NamedTuple):
    """The findings of `check_meta_gradient`: `print` the report, and assert `report.exact` in tests."""

    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        """Whether all comparisons passed."""
        return all(finding.passed for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:  # type: ignore[override]
        """The finding with the name `name`.
        Raises:
          KeyError: for a name that is not in the report.
        """
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        verdict = "The meta-gradient is exact." if self.exact else "The meta-gradient is NOT exact."
        return "\n".join([verdict, *map(str, self.findings)])


def check_meta_gradient(
    loss_fn: LossFn,
    params: Params,
    tasks: Task,
    inner: InnerLearner,
    *,
    query_loss_fn: LossFn | None = None,
    step_weights: StepWeights | None = None,
    directions: int = 3,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> MetaGradientReport:
    """Compares the meta-gradient with finite differences, and with the meta-gradient without compilation or `vmap`.

    The comparisons use float64, at parameters that are a small random step away from `params`. Finite differences are
    in float64 even if the loss casts to other types, so a model in bfloat16 is checked as strictly as one in float32.
    The finding 'finite' also covers `params` themselves, in the precision of training: float32 unless `jax_enable_x64`
    is set. A check evaluates the losses dozens of times, and at least twice for each array of parameters. It evaluates
    them once without compilation. Two tasks with a small batch are enough.

    The limits follow the rounding errors that the check measures. If the inner loop amplifies small changes, as a loop
    that diverges does, the differences are less certain, and the report says so.

    The report has these findings. If 'finite' fails, the report has no other finding. If the meta-gradient is not
    finite, 'meta-gradient' is the last finding.

    - 'finite': the losses before and after adaptation, and the meta-gradient, are finite.
    - 'loss gradient': `jax.grad` of the support loss before the first inner step agrees with finite differences.
    - 'value': the meta-loss is the same with and without its gradient.
    - 'meta-gradient': the jitted and vmapped meta-gradient agrees with finite differences of the meta-loss.
    - 'jit': the meta-gradient is the same compiled and not compiled.
    - 'vmap': the meta-gradient is the same with `vmap` over tasks and with a Python loop.
    - 'order': relative difference between first-order and second-order meta-gradient. Information only.
    - 'precision': relative difference between the meta-gradient in float32 and in float64. Information only.

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> def loss_fn(params, batch):
      ...     inputs, targets = batch
      ...     return jnp.mean((jnp.sin(inputs * params) - targets) ** 2), {}
      >>> batch = (jnp.array([[0.1, 0.2], [0.3, 0.4]]), jnp.zeros((2, 2)))  # Two tasks of two examples.
      >>> report = check_meta_gradient(loss_fn, jnp.ones(1), maml_jax.Task(batch, batch), maml_jax.sgd(0.1, steps=1))
      >>> report.exact
      True
      >>> print(report["jit"].meaning)
      The meta-gradient is the same compiled and not compiled.

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, as for `maml`.
      params: parameters at which the meta-gradient is checked, such as the initial parameters.
      tasks: a batch of tasks, every leaf `[T, ...]`.
      inner: the inner learner, as for `maml`.
      query_loss_fn: as for `maml`.
      step_weights: as for `maml`. A function is evaluated at meta-step 0.
      directions: number of random directions in the space of the meta-parameters.
      tolerance: largest relative difference that counts as agreement in float64, where rounding errors are smaller.
      seed: seed of the random step and of the directions.

    Returns:
      A `MetaGradientReport`.

    Raises:
      ValueError, TypeError: for arguments that `maml` does not allow, and for an inner learner with 0 steps.
    """
    validation.inner("inner", inner, InnerLearner)
    validation.at_least("inner.steps", inner.steps, 1)
    weights = step_weights(jnp.zeros([], jnp.int32)) if callable(step_weights) else step_weights
    if weights is not None:
        validation.weights("step_weights", weights, inner.steps + 1)
    validation.at_least("directions", directions, 1)
    validation.positive("tolerance", tolerance)
    validation.num_tasks(tasks)
    validation.floating_params(params)
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    trains_in_float64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    with jax.enable_x64(True):
        # The problem in float64, a random step away from the given parameters, and the same problem in float32.
        random = np.random.default_rng(seed)
        given, tasks = cast((params, tasks), np.float64)
        params = jax.tree.map(lambda leaf: leaf + PERTURBATION * random.standard_normal(leaf.shape), given)
        objective = partial(task_loss, support_loss, query_loss, step_weights=weights)
        problem = Problem(support_loss, objective, inner, params, tasks)
        problem_in_float32 = problem.in_float32()

        finite = _finite(problem, problem if trains_in_float64 else problem_in_float32, given)
        if not finite.passed:
            return MetaGradientReport((finite,))

        # The meta-gradient to check, and the same with all operations in float64.
        value, gradient = problem.value_and_grad(problem.start)
        coarsest = problem.coarsest()
        exact = problem if coarsest == np.float64 else problem.in_float64()
        exact_value, exact_gradient = exact.value_and_grad(exact.start)
        # The lowest precision that remains sets the tolerance of the differences.
        checker = gradient_checker(tolerance, exact.coarsest(), directions, seed)
        # Rounding errors set the limit of the other comparisons.
        amplification = _amplification(exact, exact_gradient, seed)
        rounding = max(
            amplification * float(np.finfo(np.float64).eps),
            relative_difference(gradient, exact_gradient),
            _relative_error(value, exact_value),
        )
        limit = max(tolerance, min(10 * rounding, gradient_checker(tolerance, coarsest, directions, seed).largest))
        findings = [
            finite,
            _loss_gradient(checker, exact),
            _value(limit, problem, value),
            _meta_gradient(checker, exact, exact_gradient, amplification),
        ]
        if np.isfinite(norm(gradient)):
            findings += [
                _jit(limit, problem, gradient),
                _vmap(limit, problem, gradient),
                _order(problem, gradient),
                _precision(problem_in_float32, exact_gradient, coarsest),
            ]
    return MetaGradientReport(tuple(findings))


def _amplification(problem: Problem, gradient: Any, seed: int) -> float:
    """The relative change of the meta-gradient over a small relative change of the meta-parameters."""
    length = SMALL_CHANGE * norm(problem.start)
    direction = random_direction(np.random.default_rng(seed), problem.start)
    moved = jax.tree.map(lambda x, d: np.asarray(x) + length * d, problem.start, direction)
    return relative_difference(problem.value_and_grad(moved)[1], gradient) / SMALL_CHANGE


def _relative_error(value: jax.Array, expected: jax.Array) -> float:
    return float(abs(value - expected) / jnp.maximum(abs(expected), jnp.finfo(expected.dtype).tiny))


def _finite(problem: Problem, trained: Problem, given: Params) -> Finding:
    """Whether the losses and the meta-gradient are finite; if not, the message says where.

    `trained` is the problem in the precision of training. `given` are the parameters without the random step.
    """
    dtype = np.dtype(np.float64 if trained is problem else np.float32)

    def failure() -> str:
        support = [float(problem.support_loss(problem.started(task), task.support)) for task in problem.each_task()]
        if not np.isfinite(support).all():
            return (
                "The support loss is not finite before any adaptation. Check the tasks and the parameters for values "
                "that are not finite, and the loss for a log, a division or a square root. "
                f"{diagnosis.values_to_check(problem.tasks)}"
            ).strip()
        if not np.isfinite(problem.jitted_meta_loss(problem.start)):
            return (
                "The support loss is finite before adaptation, but the query loss after it is not. If the inner loop "
                "diverges, use a smaller inner rate or fewer steps. Otherwise check the query sets for values that "
                "are not finite."
            )
        with jax.enable_x64(dtype == np.float64):
            value, gradient = trained.value_and_grad(trained.start._replace(params=cast(given, dtype)))
        if not np.isfinite(value):
            return (
                f"At the given parameters, in {dtype}, the meta-loss is not finite. If the inner loop diverges, use a "
                "smaller inner rate, fewer steps or higher precision."
            )
        leaves = jax.tree_util.tree_leaves_with_path(gradient)
        if wrong := leaf_names([path for path, leaf in leaves if not np.isfinite(leaf).all()]):
            return (
                f"At the given parameters, in {dtype}, the meta-gradient is not finite in {wrong}. Where an inner "
                "gradient is exactly zero, for example beside weights that start at zero, an inner optimizer with a "
                "square root has no derivative: Adam and its variants need eps_root > 0. In the loss, sqrt, log and "
                "norm need care at zero."
            )
        return ""

    if meaning := failure():
        return Finding("finite", float("nan"), 0.0, meaning)
    meaning = f"The losses are finite, and so is the meta-gradient at the given parameters in {dtype}."
    return Finding("finite", 0.0, 0.0, meaning)


def _loss_gradient(checker: GradientChecker, problem: Problem) -> Finding:
    """Compares the gradient of the support loss, to tell a wrong first derivative from a wrong second derivative."""
    # Take the first task with a gradient other than zero: a hinge loss, for example, can be constant on some tasks.
    for task in problem.each_task():
        params = problem.started(task)
        gradient = problem.support_gradient(params, task.support)
        if norm(gradient):
            break
    else:
        meaning = (
            "The gradient of the support loss is zero, so the inner loop learns nothing. Look for stop_gradient, "
            "rounding or argmax in the loss, and check that the loss uses the parameters that it is given."
        )
        return Finding("loss gradient", float("inf"), checker.tolerance, meaning)
    found = checker.compare(lambda params: problem.support_loss(params, task.support), params, gradient)
    if found.passed:
        meaning = "jax.grad of the support loss agrees with finite differences."
    else:
        meaning = (
            f"jax.grad of the support loss disagrees with finite differences{_in_leaves(found)}. Look for "
            "stop_gradient, rounding or a custom derivative in the loss and the model."
        )
    return Finding("loss gradient", found.error, found.limit, meaning)


def _in_leaves(found: Comparison) -> str:
    return f" in {leaf_names(list(found.failing))}" if found.failing else ""


def _value(limit: float, problem: Problem, value: jax.Array) -> Finding:
    error = _relative_error(value, problem.jitted_meta_loss(problem.start))
    if error <= limit:
        meaning = "The meta-loss is the same with and without its gradient."
    else:
        meaning = (
            "The meta-loss has a different value when it is compiled together with its gradient. The usual cause is "
            "the derivative of a maximum reduction. For max-pooling use maml_jax.nets.layers.max_pool."
        )
    return Finding("value", error, limit, meaning)


def _meta_gradient(checker: GradientChecker, problem: Problem, gradient: Any, amplification: float) -> Finding:
    if norm(gradient) == 0:
        meaning = (
            "The meta-gradient is zero, so nothing is meta-learned. Look for stop_gradient, rounding or argmax in the "
            "query loss, and check that the query loss uses the parameters that it is given."
        )
        return Finding("meta-gradient", float("inf"), checker.tolerance, meaning)
    found = checker.compare(problem.jitted_meta_loss, problem.start, gradient)
    if problem.inner.order == 1:
        meaning = (
            "The inner learner is first order (order=1), so its meta-gradient is an approximation. The error is its "
            "difference from the finite differences."
        )
    elif not np.isfinite(norm(gradient)):
        meaning = (
            "The meta-gradient is not finite. An inner optimizer with a square root, such as Adam, needs eps_root > 0. "
            "In the loss, sqrt, log and norm need care at zero."
        )
    elif found.passed:
        meaning = (
            f"The meta-gradient agrees with finite differences of the meta-loss along {checker.directions} random "
            "directions and in each array."
        )
        leaves = jax.tree_util.tree_leaves_with_path(gradient)
        if zero := leaf_names([path for path, leaf in leaves if not np.any(leaf)]):
            meaning += f" It is zero in {zero}: these parameters are not meta-learned."
    else:
        meaning = (
            f"The meta-gradient disagrees with finite differences of the meta-loss{_in_leaves(found)}. If 'loss "
            "gradient' agrees, look for an operation with a wrong second derivative, or for stop_gradient in the query "
            "loss or the inner optimizer."
        )
    if amplification > LARGE_AMPLIFICATION:
        meaning += (
            f" The inner loop amplifies a small change of the parameters {amplification:.0e} times, so that finite "
            "differences are less certain: use a smaller inner rate or fewer steps for a stricter check."
        )
    return Finding("meta-gradient", found.error, found.limit, meaning)


def _jit(limit: float, problem: Problem, gradient: Any) -> Finding:
    with jax.disable_jit():
        error = relative_difference(gradient, jax.grad(problem.meta_loss)(problem.start))
    if error <= limit:
        meaning = "The meta-gradient is the same compiled and not compiled."
    else:
        meaning = (
            "Compilation changes the meta-gradient: the compiled program is wrong (see 'value'), or the loss has side "
            "effects."
        )
    return Finding("jit", error, limit, meaning)


def _vmap(limit: float, problem: Problem, gradient: Any) -> Finding:
    gradients = [problem.task_gradient(problem.start, task) for task in problem.each_task()]
    error = relative_difference(gradient, jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients))
    if error <= limit:
        meaning = "The meta-gradient is the same with vmap over tasks and with a Python loop over tasks."
    else:
        meaning = (
            "The meta-gradient with vmap over tasks differs from the meta-gradient with a Python loop over tasks. An "
            "operation in the loss behaves differently under vmap."
        )
    return Finding("vmap", error, limit, meaning)


def _order(problem: Problem, gradient: Any) -> Finding:
    other = problem.with_order(1 if problem.inner.order == 2 else 2).value_and_grad(problem.start)[1]
    first, second = (gradient, other) if problem.inner.order == 1 else (other, gradient)
    error = relative_difference(first, second)
    if error > 0:
        meaning = "The relative difference between the first-order and the second-order meta-gradient."
    else:
        meaning = (
            "First order equals second order: the inner gradient does not depend on the parameters. Unless the loss is "
            "linear in the parameters, look for stop_gradient in the loss."
        )
    return Finding("order", error, float("inf"), meaning)


def _precision(problem_in_float32: Problem, gradient: Any, coarsest: np.dtype) -> Finding:
    with jax.enable_x64(False):
        rounded = problem_in_float32.value_and_grad(problem_in_float32.start)[1]
    error = relative_difference(cast(rounded, np.float64), gradient)
    meaning = "The relative difference between the meta-gradient in float32 and in float64."
    if error > LARGE_ROUNDING:
        meaning += (
            " If the loss draws random numbers, these differ between the two types. Otherwise the inner loop amplifies "
            "rounding errors: a smaller inner rate, fewer steps or float64 help."
        )
    if coarsest != np.float64:
        meaning += (
            f" The loss computes in {coarsest} whatever the type of its inputs. 'loss gradient' and 'meta-gradient' "
            "compare it in float64. The limits of 'value', 'jit' and 'vmap' follow its rounding errors."
        )
    return Finding("precision", error, float("inf"), meaning)
