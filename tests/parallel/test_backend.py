"""Tests of the choices of implementation by backend and sizes."""

from maml_jax.parallel import backend


def test_only_a_cpu_maps_over_large_images_and_normalises_kernels(monkeypatch):
    assert backend.maps_over_images((75, 84, 84), 3, 32) and not backend.maps_over_images((20, 28, 28), 3, 16)
    assert backend.normalises_kernel(27, 32) and not backend.normalises_kernel(36, 32)
    assert not backend.maps_over_images((75, 84, 84), 32, 32)  # Many channels: recomputing costs more.
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    assert not backend.maps_over_images((75, 84, 84), 3, 32) and not backend.normalises_kernel(27, 32)
