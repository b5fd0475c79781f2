"""Model-agnostic meta-learning on JAX: pure functions for learning to adapt in a few gradient steps."""

from maml_jax.check import MetaGradientReport, check_meta_gradient
from maml_jax.inner import InnerLearner, adapt, no_adaptation, sgd, unrolled
from maml_jax.meta import MetaLearner, maml
from maml_jax.runs.model_file import Saved, load, restore, save
from maml_jax.types import AdaptInfo, Evaluation, LossFn, MetaInfo, MetaState, Task

__version__ = "0.1.0"

__all__ = [
    "AdaptInfo",
    "Evaluation",
    "InnerLearner",
    "LossFn",
    "MetaGradientReport",
    "MetaInfo",
    "MetaLearner",
    "MetaState",
    "Saved",
    "Task",
    "adapt",
    "check_meta_gradient",
    "load",
    "maml",
    "no_adaptation",
    "restore",
    "save",
    "sgd",
    "unrolled",
]
