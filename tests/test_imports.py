"""What an import brings along, and which file may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import maml_jax

HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "matplotlib",
    "PIL",
    "flax",
    "tyro",
    "mujoco",
    "tensorboardX",
    "wandb",
)
ROOT = Path(maml_jax.__file__).parent


def test_import_is_light_and_touches_no_device():
    # With a platform that does not exist, the first touch of a device fails.
    code = (
        "import os, sys; os.environ['JAX_PLATFORMS'] = 'nonexistent'; import maml_jax, maml_jax.losses, "
        "maml_jax.tasks.sinusoid, maml_jax.tasks.episodes, maml_jax.tasks.omniglot, maml_jax.tasks.images, "
        "maml_jax.convolution, maml_jax.train, maml_jax.task_axis, maml_jax.checkpoint, maml_jax.signals, "
        "maml_jax.workdir, maml_jax.record, maml_jax.progress, maml_jax.provenance; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    touch = "import os; os.environ['JAX_PLATFORMS'] = 'nonexistent'; import jax; jax.devices()"
    assert subprocess.run([sys.executable, "-c", touch], capture_output=True).returncode != 0


def test_models_and_plots_bring_no_tensorflow():
    code = "import sys, maml_jax.models, maml_jax.plots; print('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


LAYERS = [  # Each may import only from those before it.
    {"types", "backend", "invariant", "workdir", "events", "differences"},
    {"trees", "profiling", "wandb_copy", "validation", "tasks.cache"},
    {"hosts", "mixed", "provenance"},
    {"inner", "task_axis", "convolution", "losses", "statistics", "tasks.sinusoid", "tasks.episodes", "tasks.omniglot"},
    {"signals", "progress", "tasks.published", "tasks.pickles", "checkpoint", "saved"},
    {"meta", "normalisation", "curvature", "per_step", "tasks.download", "tasks.image_sources", "tasks.host"},
    {"layers", "reptile", "implicit", "schedules", "tasks.images", "evaluation", "running"},
    {"check", "models", "train", "record", "plots"},
    {"heads", "resumable"},
    {"rl.environment", "rl.policy", "rl.baseline", "rl.plots", "rl.engine"},
    {"rl.mjx_engine"},
    {"rl.navigation", "rl.locomotion", "rl.gymnasium", "rl.rollout"},
    {"rl.advantage"},
    {"rl.losses"},
    {"rl.objective"},
    {"rl.outer"},
    {"rl.trust_region", "rl.meta_rl"},
]


def test_files_depend_in_one_direction():
    level = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    found = set()
    for path in ROOT.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("maml_jax"):
                base = node.module.removeprefix("maml_jax").removeprefix(".")
                for alias in node.names:
                    target = base if base in level else f"{base}.{alias.name}".removeprefix(".")
                    assert level[target] < level[name], f"{name} imports {target}"
    assert found == set(level)


def test_the_core_can_be_read_in_one_sitting():
    core = [ROOT / name for name in ("types.py", "inner.py", "meta.py", "task_axis.py")]
    assert sum(len(path.read_text().splitlines()) for path in core) < 800
