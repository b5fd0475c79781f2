"""Provenance of a result: command, commit, versions and hardware."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from maml_jax.runs.files import now

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "tensorflow-datasets")
EXTRAS = ("mujoco", "mujoco-mjx", "gymnasium")
"""Optional packages that numbers may depend on."""


def provenance(devices: str | None = None) -> dict[str, Any]:
    """Returns the command, commit, versions and hardware of this process, as a dict for JSON.

    Args:
      devices: a description of the devices; None describes the devices of this process.
    """
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    program = ["python", "-m", module] if module else ["python", Path(sys.argv[0]).name]
    devices = devices or f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": _versions(),
        "hardware": f"{devices} ({_processor()}, {os.cpu_count()} cores)",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "processes": jax.process_count(),
        "started": now(),
    }


def jax_settings() -> dict[str, Any]:
    """Returns the settings of JAX that change numbers."""
    names = (
        "jax_default_prng_impl",
        "jax_threefry_partitionable",
        "jax_random_seed_offset",
        "jax_high_dynamic_range_gumbel",
        "jax_enable_x64",
        "jax_default_matmul_precision",
    )
    return {name: getattr(jax.config, name) for name in names}


def software() -> dict[str, Any]:
    """Returns the commit, the versions of packages and the settings of JAX, by name."""
    return {"commit": _commit(), **_versions(), **jax_settings()}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        **{name: version for name in EXTRAS if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of the checkout of this package, with '+changes' after changes; None without a checkout."""
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # Fails if the checkout is another project.
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
