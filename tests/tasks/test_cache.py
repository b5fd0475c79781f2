"""The cache of resized images."""

import numpy as np

from maml_jax.tasks import cache


def test_a_cache_with_another_hash_is_not_read(tmp_path):
    path = tmp_path / "cache.npz"
    assert cache.read(path, lambda arrays: "x") is None
    cache.write(path, {"a": np.arange(3), "sha256": np.array("x")})
    assert cache.read(path, lambda arrays: "y") is None
    arrays = cache.read(path, lambda arrays: "x")
    assert arrays is not None and arrays["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]
