"""Tests of splitting pytrees by masks, and of joining them."""

import numpy as np
import pytest

from maml_jax.autodiff.trees import combine, divide, join, mask_tree, partition

PARAMS = {"body": [np.zeros(2), np.ones(3)], "head": np.ones(1)}


@pytest.mark.parametrize("mask", [{"body": False, "head": True}, lambda params: {"body": [False] * 2, "head": True}])
def test_partition_and_combine_are_inverse(mask):
    adapted, fixed = partition(PARAMS, mask)
    assert adapted == {"body": [None, None], "head": PARAMS["head"]} and fixed["head"] is None
    assert combine(adapted, fixed) == PARAMS
    assert combine(*partition(PARAMS, None)) == PARAMS


def test_divide_and_join_are_inverse():
    mask = {"body": [True, False], "head": False}
    assert join(*divide(PARAMS, mask)) == PARAMS


def test_messages_name_the_argument():
    with pytest.raises(ValueError, match="per_step must be a pytree of bools with the structure of the parameters"):
        mask_tree("per_step", {"other": True}, PARAMS)
    with pytest.raises(TypeError, match=r"per_step must hold True or False .* the value at \['head'\] is 1"):
        mask_tree("per_step", {"body": True, "head": 1}, PARAMS)
    with pytest.raises(ValueError, match="trainable selects no parameter"):
        partition(PARAMS, False)
