"""Tests of imports: the modules that an import loads, and the folders that a folder may import."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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


def test_import_loads_no_heavy_module_and_uses_no_device():
    # With a platform that does not exist, the first use of a device fails.
    code = (
        "import os, sys; os.environ['JAX_PLATFORMS'] = 'nonexistent'; import maml_jax, maml_jax.losses, "
        "maml_jax.tasks.sinusoid, maml_jax.tasks.episodes, maml_jax.tasks.omniglot, maml_jax.tasks.images, "
        "maml_jax.nets.convolution, maml_jax.training, maml_jax.parallel.task_axis, "
        "maml_jax.runs.checkpoint, maml_jax.runs.signals, "
        "maml_jax.runs.files, maml_jax.runs.directory, maml_jax.runs.progress, maml_jax.runs.provenance; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    uses_device = "import os; os.environ['JAX_PLATFORMS'] = 'nonexistent'; import jax; jax.devices()"
    assert subprocess.run([sys.executable, "-c", uses_device], capture_output=True).returncode != 0


def test_models_and_plots_do_not_import_tensorflow():
    code = "import sys, maml_jax.nets.models, experiments.shared.plots; print('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


MAY_IMPORT = {  # For each folder of maml_jax, the folders and files that it may import. "" is the top folder.
    "autodiff": {"types", "validation"},
    "parallel": {"types", "validation"},
    "": {"autodiff", "parallel"},
    "nets": {"types", "validation", "parallel"},
    "tasks": {"types", "validation", "atomic", "parallel"},
    "algorithms": {"", "autodiff", "parallel"},
    "rl": {"", "autodiff", "parallel", "nets"},
    "rl/envs": {"validation", "parallel", "rl"},
    "runs": {"", "parallel"},
    "pretrained": {"validation", "runs"},
}


def imports(package: Path) -> dict[str, set[str]]:
    """For each file of a package, such as `nets/layers`, the files of the package that it imports."""
    files = {path.relative_to(package).with_suffix("").as_posix(): path for path in package.rglob("*.py")}
    found = {}
    for name, path in files.items():
        if name.endswith("__init__"):
            continue
        targets = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name:
                base = "/".join(node.module.split(".")[1:])
                for alias in node.names:
                    target = f"{base}/{alias.name}".removeprefix("/")
                    targets.add(target if target in files else base)
    return found


def folder(file: str) -> str:
    return file.rpartition("/")[0]


def test_folders_import_only_allowed_folders():
    for file, targets in imports(ROOT).items():
        for target in targets:
            here, there = folder(file), folder(target)
            allowed = MAY_IMPORT[here]
            assert here == there or there in allowed or target in allowed, f"{file} imports {target}"


@pytest.mark.parametrize("package", [ROOT, ROOT.parent / "experiments"], ids=lambda path: path.name)
def test_imports_have_no_cycles(package):
    TopologicalSorter(imports(package)).prepare()  # Raises CycleError.


def test_the_core_is_short():
    """`meta.py`, with all files of the library that it imports directly or indirectly, has fewer than 1,700 lines."""
    graph, core, found = imports(ROOT), {"meta"}, {"meta"}
    while found:
        found = set().union(*(graph[file] for file in found)) - core
        core |= found
    assert sum(len((ROOT / f"{file}.py").read_text().splitlines()) for file in core) < 1700
