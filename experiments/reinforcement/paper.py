"""Numbers of the paper's experiments: the returns in the figures, and the inner rates at test."""

from typing import Literal

MethodName = Literal["maml", "first_order", "pretrained", "random", "oracle"]

Rates = tuple[float, float]
"""Inner rates at test, of the first gradient step and of later steps."""

RETURNS: dict[str, dict[MethodName, tuple[float, ...]]] = {
    "navigation": {
        "maml": (-40.4, -11.7, -3.3, -3.2),
        "pretrained": (-40.8, -19.7, -11.7, -8.5),
        "random": (-82.7, -58.0, -53.8, -46.8),
        "oracle": (-2.3,),
    },
    "half-cheetah-velocity": {
        "maml": (-129.5, -78.6, -66.6, -60.8),
        "pretrained": (-158.0, -135.4, -128.5, -133.6),
        "random": (-254.8, -254.3, -246.8, -230.8),
        "oracle": (-54.5,),
    },
    "half-cheetah-direction": {
        "maml": (-50.7, 293.0, 313.0, 316.0),
        "pretrained": (-43.0, -24.8, -12.9, 19.6),
        "random": (-35.7, 21.8, 62.3, 86.2),
        "oracle": (443.0,),
    },
    "ant-velocity": {
        "maml": (30.6, 96.7, 100.0, 101.0),
        "pretrained": (-1.8, 6.1, 8.5, 9.5),
        "random": (-78.6, -62.8, -48.6, -35.6),
        "oracle": (108.0,),
    },
    "ant-direction": {
        "maml": (8.7, 499.0, 501.0, 499.0),
        "pretrained": (3.2, 1.3, 6.5, 6.9),
        "random": (3.1, 9.3, 16.0, 26.1),
        "oracle": (525.0,),
    },
}
"""Mean returns over 40 test tasks after 0 to 3 gradient steps (the oracle takes none), by environment and method, from
the authors' code."""

TEST_RATES: dict[str, tuple[Rates, ...]] = {
    "navigation": ((0.1, 0.05), (0.1, 0.04), (0.12, 0.05), (0.2, 0.1), (0.5, 0.25)),
    "half-cheetah-velocity": ((0.1, 0.05),),
    "half-cheetah-direction": ((0.1, 0.05),),
    "ant-velocity": ((0.1, 0.05),),
    "ant-direction": ((0.1, 0.001),),
}
"""Inner rates at test by environment. Of several pairs, the best on other tasks is used."""

METHOD_TEST_RATES: dict[tuple[str, MethodName], Rates] = {
    ("half-cheetah-velocity", "pretrained"): (0.02, 0.01),
    ("half-cheetah-direction", "pretrained"): (0.2, 0.1),
    ("half-cheetah-direction", "random"): (0.5, 0.25),
    ("ant-velocity", "pretrained"): (0.2, 0.1),
    ("ant-velocity", "random"): (1.0, 0.5),
    ("ant-direction", "pretrained"): (0.2, 0.002),
    ("ant-direction", "random"): (1.0, 0.01),
}
"""Inner rates at test of the methods that the authors' code tests with other rates."""


def rates_at_test(environment: str, method: MethodName) -> tuple[Rates, ...]:
    """Returns the pairs of inner rates at test. Of several pairs, the best on other tasks is used."""
    own = METHOD_TEST_RATES.get((environment, method))
    return TEST_RATES[environment] if own is None else (own,)
