"""Model-agnostic meta-learning on JAX: pure functions for learning to adapt in a few gradient steps."""

from maml_jax import pretrained
from maml_jax.algorithms import heads
from maml_jax.algorithms.imaml import imaml
from maml_jax.algorithms.maml_plus_plus import maml_plus_plus
from maml_jax.algorithms.meta_curvature import meta_curvature
from maml_jax.algorithms.one_step import one_step_maml
from maml_jax.algorithms.reptile import reptile
from maml_jax.autodiff.clipping import clip_by_global_norm
from maml_jax.check import MetaGradientReport, check_meta_gradient
from maml_jax.inner import InnerLearner, adapt, no_adaptation, sgd, unrolled
from maml_jax.meta import MetaLearner, maml
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.model_file import Saved, load, restore, save
from maml_jax.training import train
from maml_jax.types import AdaptInfo, Evaluation, LossFn, MetaInfo, MetaParams, MetaState, Task

__version__ = "0.1.0"

__all__ = [
    # The algorithms.
    "maml",
    "reptile",
    "imaml",
    "meta_curvature",
    "maml_plus_plus",
    "one_step_maml",
    "heads",
    # The inner loop.
    "sgd",
    "unrolled",
    "no_adaptation",
    "adapt",
    "clip_by_global_norm",
    # Training, and the check of the meta-gradient.
    "train",
    "task_mesh",
    "check_meta_gradient",
    # Saved models.
    "save",
    "load",
    "restore",
    "pretrained",
    # Types.
    "AdaptInfo",
    "Evaluation",
    "InnerLearner",
    "LossFn",
    "MetaGradientReport",
    "MetaInfo",
    "MetaLearner",
    "MetaParams",
    "MetaState",
    "Saved",
    "Task",
]
