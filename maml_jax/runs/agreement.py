"""Comparison of what the processes of a run were given."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maml_jax.parallel import processes
from maml_jax.runs.files import as_json, differences


class DisagreementError(ValueError):
    """The processes of a run were given different values. The message names the values."""


def check_agreement(values: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that all processes of a run have the same values. All processes must call the function.

    Args:
      values: returns JSON-serialisable values by name. Paths are not compared: each host may have its own. The function
        is not called if there is only one process.

    Raises:
      DisagreementError: in all processes, if the values of one process differ from those of process 0.

    Example:
      >>> check_agreement(lambda: {"seed": 0, "data_dir": Path("data")})
    """
    if not processes.multiple():
        return
    mine = as_json({name: None if isinstance(value, Path) else value for name, value in values().items()})
    different = differences(processes.broadcast_from_leader(lambda: mine), mine)
    text = ", ".join(f"{name} is {here!r}, not {there!r}" for name, (there, here) in different.items())
    for number, found in enumerate(processes.all_gather_text(text)):
        if found:
            raise DisagreementError(
                f"process {number} differs from process 0: {found}. Give all processes the same options, data and "
                "versions."
            )
