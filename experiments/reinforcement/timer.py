"""The processor time of meta-iterations."""

import time
from pathlib import Path

from maml_jax.parallel import processes
from maml_jax.runs.files import read_json

FEWEST = 9
"""Minimum number of meta-iterations in a measurement. Short measurements are not exact: a meta-iteration starts before
the previous one is logged."""


class Timer:
    """Measures the processor time of a meta-iteration, over all cores and without compilation."""

    def __init__(self) -> None:
        self._updates = 0
        self._start = (0, 0.0)
        self.seconds: float | None = None
        """Mean processor time of a meta-iteration in seconds; None until `FEWEST` meta-iterations have ended."""

    def update(self, step: int) -> None:
        """Records that the meta-iteration `step` has ended."""
        self._updates += 1
        # The measurement starts at the second update. The first comes from a checkpoint or includes compilation.
        if self._updates == 2:
            self._start = (step, time.process_time())
        elif self._updates > 2 and (count := step - self._start[0]) >= FEWEST:
            self.seconds = (time.process_time() - self._start[1]) / count


def earlier_seconds(directory: Path) -> dict[tuple[str, int], float | None]:
    """Returns the times that an earlier start of the run measured, by method and seed; empty except in process 0."""
    results = directory / "results.json"
    if not (processes.is_leader() and results.exists()):
        return {}
    return {(row["method"], row["seed"]): row["cpu_seconds"] for row in read_json(results)["rows"]}
