"""The cache of arrays."""

import numpy as np

from maml_jax.tasks import cache


def test_arrays_are_read_only_if_their_hash_is_right(tmp_path):
    path = tmp_path / "it.npz"
    assert cache.read(path, lambda arrays: "x") is None
    cache.write(path, {"a": np.arange(3), "sha256": np.array("x")})
    assert cache.read(path, lambda arrays: "y") is None
    arrays = cache.read(path, lambda arrays: "x")
    assert arrays is not None and arrays["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]
