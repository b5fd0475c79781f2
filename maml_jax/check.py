"""Shows a user whether the meta-gradient of their own model and loss is exact.

A meta-gradient can be wrong without any error: by a `stop_gradient` somewhere in the loss, an
operation whose second derivative is not that of its first, or a compiler that disagrees with itself.
Training still runs then, only worse. Here the gradient is held against what it is the derivative of.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.autodiff.finite_differences import (
    GradientChecker,
    cast,
    coarsest_type,
    gradient_checker,
    listed,
    norm,
    relative_difference,
)
from maml_jax.inner import InnerLearner, adapted_part
from maml_jax.meta import StepWeights, task_loss
from maml_jax.types import LossFn, Params, Task

NUDGE = 1e-3
"""Standard deviation of the random step that is taken away from the given parameters: initial biases of
zero put a ReLU exactly on its kink for an input of zeros, where nothing has a derivative."""

ROUNDING = 0.05
"""From this part of the meta-gradient on, rounding in float32 is called large."""


class Finding(NamedTuple):
    """One comparison."""

    name: str
    error: float
    """Relative difference between the two things compared; NaN if one of them is not finite."""
    limit: float
    """The largest error that counts as agreement; infinite for what is only told."""
    meaning: str
    """What it says about the user's model, and what to do if it failed."""

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.limit) or self.limit == float("inf")


class MetaGradientReport(NamedTuple):
    """All findings; `print` it. `report.exact` is what a test asserts."""

    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        """Whether every comparison agreed."""
        return all(finding.passed for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:  # type: ignore[override]
        """The finding of that name."""
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        verdict = "The meta-gradient is exact." if self.exact else "The meta-gradient is NOT exact."
        lines = [verdict]
        for finding in self.findings:
            mark = ("told" if finding.limit == float("inf") else "ok") if finding.passed else "FAIL"
            limit = "" if finding.limit == float("inf") else f" (limit {finding.limit:.0e})"
            lines.append(f"{mark:>4}  {finding.name}: {finding.error:.1e}{limit}. {finding.meaning}")
        return "\n".join(lines)


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
    """Compares the meta-gradient with central differences, and with itself computed in other ways.

    In float64, whatever the types given, and a small random step away from `params`; whether it is finite, as
    training would have it: at `params` themselves, and in float32 unless JAX was told `jax_enable_x64`. It takes
    some hundred evaluations of the meta-loss, some of them not compiled: two tasks and a small batch are enough.

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, as for `maml`.
      params: where to check, such as the initial parameters.
      tasks: a batch of tasks, leading axis `T` on every leaf.
      inner: the inner learner, as for `maml`.
      query_loss_fn, step_weights: as for `maml`; of a function from the meta-step, the weights at the first.
      directions: random directions in the space of the meta-parameters.
      tolerance: relative difference up to which two results agree.
      seed: of the directions.

    Returns:
      A `MetaGradientReport` of these findings, of which those after 'finite' are left out where there is nothing to
      compare:
      'finite': the losses before and after adaptation, and the meta-gradient at `params`;
      'loss gradient': `jax.grad` of the loss against its central differences;
      'value': the loss out of `value_and_grad` against the loss alone;
      'meta-gradient': jitted and vmapped, against central differences of the jitted meta-loss;
      'jit': jitted against not jitted; 'vmap': mapped over tasks against a Python loop over them;
      'order': second order against first, told, not judged;
      'precision': the meta-gradient in float32 against float64.

    Raises:
      ValueError, TypeError: for arguments that `maml` would refuse, and for an inner learner with no steps.
    """
    if not isinstance(inner, InnerLearner):
        raise TypeError(f"inner must come from maml_jax.sgd or maml_jax.unrolled, but got {inner!r}.")
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

    wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    with jax.enable_x64(True):
        random = np.random.default_rng(seed)
        given, tasks = cast((params, tasks), np.float64)
        params = jax.tree.map(lambda leaf: leaf + NUDGE * random.standard_normal(leaf.shape), given)
        of_task = partial(task_loss, support_loss, query_loss, step_weights=weights)
        problem = _Problem(support_loss, of_task, inner, params, tasks)
        single = problem.in_float32()
        finite = _finite(problem, problem if wide else single, given)
        if not finite.passed:
            return MetaGradientReport((finite,))
        value, gradient = problem.value_and_grad(problem.start)
        coarsest = coarsest_type(jax.make_jaxpr(problem.meta_loss)(problem.start).jaxpr)
        checker = gradient_checker(tolerance, coarsest, directions, seed)
        findings = [
            finite,
            _loss_gradient(checker, problem),
            _value(checker, problem, value),
            _meta_gradient(checker, problem, gradient),
        ]
        if np.isfinite(norm(gradient)):  # Else there is nothing to compare any more.
            findings += [
                _jit(checker, problem, gradient),
                _vmap(checker, problem, gradient),
                _order(problem, gradient),
                _precision(problem, single, gradient, coarsest),
            ]
    return MetaGradientReport(tuple(findings))


class _Problem:
    """The meta-loss of one batch of tasks as a function of `(params, rates)` alone, and its gradient."""

    def __init__(
        self,
        support_loss: LossFn,
        objective: Callable[[InnerLearner, Any, Task], tuple[jax.Array, Any]],
        inner: InnerLearner,
        params: Params,
        tasks: Task,
    ):
        self.parts = (support_loss, objective, inner, params, tasks)
        self.inner, self.tasks = inner, tasks
        self.start = (params, inner.init_inner_params(adapted_part(inner, params)))

        def of_task(meta_params: Any, task: Task) -> jax.Array:
            return objective(inner, meta_params, task)[0]

        def meta_loss(meta_params: Any) -> jax.Array:
            return jax.vmap(partial(of_task, meta_params))(tasks).mean()

        self.support_loss = jax.jit(lambda params, support: support_loss(params, support)[0])
        self.meta_loss, self.loss = meta_loss, jax.jit(meta_loss)
        self.value_and_grad = jax.jit(jax.value_and_grad(meta_loss))
        self.task_gradient = jax.jit(jax.grad(of_task))

    def with_order(self, order: Literal[1, 2]) -> "_Problem":
        support_loss, objective, inner, params, tasks = self.parts
        return _Problem(support_loss, objective, inner._replace(order=order), params, tasks)

    def in_float32(self) -> "_Problem":
        support_loss, objective, inner, *data = self.parts
        with jax.enable_x64(False):
            return _Problem(support_loss, objective, inner, *cast(tuple(data), np.float32))


def _finite(problem: _Problem, trained: _Problem, given: Params) -> Finding:
    """Numbers first: of what is none, nothing else can be told. `trained` is in the precision of training."""
    support = [float(problem.support_loss(problem.start[0], task.support)) for task in _each_task(problem.tasks)]
    dtype = np.dtype(np.float64 if trained is problem else np.float32)
    meaning = ""
    if not np.isfinite(support).all():
        meaning = (
            "The support loss is not a finite number before any adaptation. Look for what is not finite in the tasks "
            "and the parameters, and for a log, a division or a root in the loss."
        )
    elif not np.isfinite(problem.loss(problem.start)):
        meaning = (
            "The loss after adaptation is not a finite number, while that of the support sets before it is. The inner "
            "loop diverges, then a smaller inner rate or fewer steps help, or the query sets hold what is not finite."
        )
    else:
        with jax.enable_x64(dtype == np.float64):
            value, gradient = trained.value_and_grad((cast(given, dtype), trained.start[1]))
        wrong = _not_finite(gradient)
        if not np.isfinite(value):
            meaning = (
                f"At the given parameters, in {dtype}, the meta-loss is not a finite number. A smaller inner rate, "
                "fewer steps or more precision help where the inner loop diverges."
            )
        elif wrong:
            meaning = (
                f"At the given parameters, in {dtype}, the meta-gradient is not finite along {wrong}. Where a gradient "
                "is exactly zero, as beside weights that start at zero, an inner optimizer with a square root has no "
                "derivative: Adam needs eps_root > 0, and so do its kin. A loss with sqrt, log or norm needs care "
                "at zero."
            )
    if meaning:
        return Finding("finite", float("nan"), 0.0, meaning)
    meaning = f"Losses, and at the given parameters in {dtype} the meta-gradient, are finite numbers."
    return Finding("finite", 0.0, 0.0, meaning)


def _not_finite(tree: Any) -> str:
    """Names the leaves that are not finite."""
    return listed([path for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.isfinite(leaf).all()])


def _loss_gradient(checker: GradientChecker, problem: _Problem) -> Finding:
    """The inner gradient by itself, so that a fault in the loss is told from one in its second derivative."""
    params = problem.start[0]
    for task in _each_task(problem.tasks):  # The first that has a gradient: in one task a hinge may be at rest.
        loss = partial(problem.support_loss, support=task.support)
        gradient = jax.grad(loss)(params)
        if norm(gradient):
            break
    else:
        meaning = (
            "The gradient of the support loss is zero along all parameters, so that the inner loop learns nothing. "
            "Look for stop_gradient, rounding or argmax, and whether the loss takes the parameters that it is given."
        )
        return Finding("loss gradient", float("inf"), checker.tolerance, meaning)
    error = checker.error(loss, params, gradient)
    if error <= checker.tolerance:
        meaning = "jax.grad of the support loss is its derivative."
    else:
        where = checker.failing_leaves(loss, params, gradient)
        meaning = (
            f"jax.grad of the support loss is not its derivative{where}. Look for stop_gradient, rounding or a custom "
            "derivative in the loss and the model."
        )
    return Finding("loss gradient", error, checker.tolerance, meaning)


def _value(checker: GradientChecker, problem: _Problem, value: jax.Array) -> Finding:
    alone = problem.loss(problem.start)
    error = float(abs(value - alone) / jnp.maximum(abs(alone), jnp.finfo(alone.dtype).tiny))
    if error <= checker.tolerance:
        meaning = "The meta-loss is the same with and without its gradient."
    else:
        meaning = (
            "Compiled together with its gradient the meta-loss is another number than alone: the compiler disagrees "
            "with itself. The derivative of a maximum reduction is the usual cause; for max-pooling take "
            "maml_jax.nets.layers.max_pool."
        )
    return Finding("value", error, checker.tolerance, meaning)


def _meta_gradient(checker: GradientChecker, problem: _Problem, gradient: Any) -> Finding:
    if norm(gradient) == 0:
        meaning = (
            "It is zero along all parameters, so that nothing is meta-learned. Look for stop_gradient, rounding or "
            "argmax in the query loss, and whether it takes the parameters that it is given."
        )
        return Finding("meta-gradient", float("inf"), checker.tolerance, meaning)
    error = checker.error(problem.loss, problem.start, gradient)
    if problem.inner.order == 1:
        meaning = "The inner learner is first order (order=1), an approximation: its slope is off by this much here."
    elif error <= checker.tolerance:
        meaning = f"It agrees with differences of the meta-loss along {checker.directions} random directions."
        still = [path for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(leaf)]
        if still:
            meaning += f" Along {listed(still)} it is zero, so that these are not meta-learned."
    elif not np.isfinite(norm(gradient)):
        meaning = (
            "It is not finite. An inner optimizer with a square root, such as Adam, needs eps_root > 0; a loss with "
            "sqrt, log or norm needs care at zero."
        )
    else:
        where = checker.failing_leaves(problem.loss, problem.start, gradient)
        meaning = (
            f"It is not the derivative of the meta-loss{where}. If 'loss gradient' agrees, look for an operation whose "
            "second derivative is wrong, or a stop_gradient in the query loss or the inner optimizer."
        )
    return Finding("meta-gradient", error, checker.tolerance, meaning)


def _jit(checker: GradientChecker, problem: _Problem, gradient: Any) -> Finding:
    with jax.disable_jit():
        error = relative_difference(gradient, jax.grad(problem.meta_loss)(problem.start))
    if error <= checker.tolerance:
        meaning = "Compiled and not compiled it is the same."
    else:
        meaning = "Compiling changes it: a fault of the compiler, see 'value', or a loss with effects."
    return Finding("jit", error, checker.tolerance, meaning)


def _vmap(checker: GradientChecker, problem: _Problem, gradient: Any) -> Finding:
    each = [problem.task_gradient(problem.start, task) for task in _each_task(problem.tasks)]
    error = relative_difference(gradient, jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each))
    if error <= checker.tolerance:
        meaning = "Mapped over tasks it is the same as in a Python loop over them."
    else:
        meaning = "Mapped over tasks it differs from a Python loop over them: something in the loss changes under vmap."
    return Finding("vmap", error, checker.tolerance, meaning)


def _each_task(tasks: Task) -> list[Task]:
    return [jax.tree.map(operator.itemgetter(index), tasks) for index in range(validation.num_tasks(tasks))]


def _order(problem: _Problem, gradient: Any) -> Finding:
    other = problem.with_order(1 if problem.inner.order == 2 else 2).value_and_grad(problem.start)[1]
    first, second = (gradient, other) if problem.inner.order == 1 else (other, gradient)
    change = relative_difference(first, second)
    if change > 0:
        meaning = "First order differs from second by this much of its norm here."
    else:
        meaning = (
            "First order equals second: the inner gradient does not depend on the parameters. Unless the loss is "
            "linear in them, something in it is detached."
        )
    return Finding("order", change, float("inf"), meaning)


def _precision(problem: _Problem, single: _Problem, gradient: Any, coarsest: np.dtype) -> Finding:
    with jax.enable_x64(False):
        rounded = single.value_and_grad(single.start)[1]
    error = relative_difference(cast(rounded, np.float64), gradient)
    note = ""
    if coarsest != np.float64:
        note = f" The loss computes in {coarsest} whatever it is given, so nothing here is judged more finely."
    if error <= ROUNDING:
        meaning = f"In float32 rounding changes it by this much.{note}"
    else:
        meaning = (
            "In float32 rounding changes it by this much, because the inner loop amplifies it. A smaller inner rate, "
            f"fewer steps or float64 help.{note}"
        )
    return Finding("precision", error, float("inf"), meaning)
