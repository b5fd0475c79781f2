"""Fixtures: float64, real data, and two host devices so that tests of several devices run everywhere."""

import os
import signal
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import pytest


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: `MAML_JAX_DATA`, or `shared/data` beside the checkout."""
    path = Path(os.environ.get("MAML_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        reason = f"No data for tests in {path}; set MAML_JAX_DATA to a folder with omniglot/ and tfds/ in it."
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def omniglot_cache(tmp_path_factory) -> Path:
    """A cache directory that tests share, so that the images are prepared once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as on a terminal: what a shell starts in the background ignores it, and so would its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
