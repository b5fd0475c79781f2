"""Fixtures: float64, real data, and two host devices so that tests of several devices run everywhere."""

import gc
import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

# Most of the time goes into compiling programs that run once: not worth what LLVM does to make them faster. XLA's own
# passes stay as users have them; XLA_FLAGS=--xla_backend_optimization_level=3 brings back the rest.
# Up to jaxlib .10 the emitters of fusions take three times as long to compile as what they replaced; later ones have no
# such flag, and would end at it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    + ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith("0.10.") else "")
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def x64_everywhere():
    """Float64 in all threads, as engines on the host are called from any; `jax.enable_x64` is for its own thread."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What is compiled is kept for the other tests of a file, and for processes that are told these options."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield options
            time.sleep(0.1)
            gc.collect()  # What orbax left behind, while it may.
