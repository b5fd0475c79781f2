"""Fixtures for all tests: float64, real data, and two CPU devices for the tests of several devices."""

import gc
import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

# Most of the test time is compilation of programs that run once. LLVM's optimisations would take longer than they save,
# so they are off. XLA's own passes are as for users. XLA_FLAGS=--xla_backend_optimization_level=3 turns all
# optimisations on. In jaxlib 0.10 the fusion emitters take three times as long to compile as the older emitters, and a
# division of the code of a program for several threads takes 15% longer than no division. Later versions do not have
# the flag that turns the emitters off, and abort at an unknown flag.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    + (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        if version("jaxlib").startswith("0.10.")
        else ""
    )
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
    """Runs the test in float64 in all threads. JAX calls simulators on the host from other threads, which
    `jax.enable_x64` does not reach."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: `MAML_JAX_DATA`, or `shared/data` beside the checkout."""
    path = Path(os.environ.get("MAML_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        reason = f"{path} does not exist: set MAML_JAX_DATA to a folder that contains omniglot/ and tfds/."
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
    """Makes SIGINT raise KeyboardInterrupt, as on a terminal. Background jobs of a shell, and their children, ignore
    SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory) -> Path:
    """A folder of compiled programs for the tests of one process, and for the processes that these tests start."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(compiled_programs):
    """Keeps compiled programs for other tests, and for processes that get the yielded options."""
    options = {
        "jax_compilation_cache_dir": str(compiled_programs),
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
            gc.collect()  # Collect the coroutines of orbax here, where warnings about them fail no test.
