"""Recipes of few-shot training: values for the options that are not given. The experiments add those of their data."""

from typing import Any

PAPER: dict[str, Any] = {
    "method": "maml",
    "steps": 60_000,
    "outer_rate": 1e-3,
    "optimizer": "adam",
    "anneal": False,
    "head_rates": (),
    "learn_rates": False,
    "downscale": 1,
    "flips": False,
    "first_steps": None,
}
"""The paper's recipe for all data sets (appendix A.1). The values that depend on the data are in the experiments."""

ONE_STEP: dict[str, Any] = PAPER | {
    "method": "one-step",
    "inner_steps": 1,
    "learn_rates": True,
    "optimizer": "muon",
    "outer_rate": 0.01,
    "anneal": True,
}
"""The recipe 'one-step' for all data sets: exact MAML with one inner step from a head of zeros and learned inner rates.
Muon starts at a large rate, which decays. The experiments set few tasks per meta-step, with more classes than at test.
"""

FAST: dict[str, Any] = ONE_STEP | {"method": "zero-head", "inner_steps": 2, "outer_rate": 0.002}
"""The second phase of the recipe 'fast' for all data sets: plain MAML with two inner steps, from the last parameters of
the first phase. Afterwards accuracy hardly depends on the number of inner steps."""

LEAST_STEPS = {"maml++": 5, "reptile": 5, "imaml": 16}
"""Minimum number of inner steps by method. `for_method` raises the number of a recipe to this minimum."""


def for_method(method: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe of MAML with the changes that a method needs."""
    values = dict(recipe)
    values["inner_steps"] = max(values["inner_steps"], LEAST_STEPS.get(method, 1))
    if method == "one-step":
        values["inner_steps"] = 1
    if method == "imaml":
        # The proximal term adds curvature to the support loss: many inner steps at a large rate diverge.
        values["inner_rate"] = min(values["inner_rate"], 0.2)
    if method == "reptile":
        values |= {"outer_rate": 0.5, "clip": None}
    return values
