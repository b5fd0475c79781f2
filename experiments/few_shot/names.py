"""Names of the methods, nets, optimizers and recipes of few-shot runs, and groups of methods."""

from typing import Literal

Method = Literal[
    "maml",
    "anil",
    "boil",
    "meta-sgd",
    "meta-curvature",
    "maml++",
    "shared-head",
    "zero-head",
    "one-step",
    "prototypes",
    "reptile",
    "imaml",
    "pretrained",
]
Net = Literal["conv", "mlp"]
Optimizer = Literal["adam", "muon"]
Recipe = Literal["paper", "fast", "one-step"]
Split = Literal["train", "val", "test"]

WITHOUT_ORDER = ("reptile", "imaml", "pretrained")
"""Methods that do not differentiate through the inner steps: `order` has no effect."""
ANNEALED = ("maml++", "reptile")
"""Methods whose outer rate always falls over the meta-steps."""
WITH_HEAD_RATES = ("zero-head", "one-step")
"""Methods whose head starts from zero and may have inner rates of its own."""
WITH_OWN_TASKS = ("reptile", "pretrained")
"""Methods that set the shape of the tasks in training."""
