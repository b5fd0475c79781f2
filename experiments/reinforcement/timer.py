"""The processor time of meta-iterations."""

import time
from pathlib import Path

from maml_jax.parallel import processes
from maml_jax.runs.files import read_json

FEWEST = 9
"""Meta-iterations that a measurement needs. While one is logged, the next already runs."""


class Timer:
    """Measures the processor time of a meta-iteration, over all cores and without compilation."""

    def __init__(self) -> None:
        self._updates = 0
        self._start = (0, 0.0)
        self.seconds: float | None = None
        """Mean processor time of a meta-iteration; None until there are enough of them."""

    def update(self, step: int) -> None:
        """Records that the meta-iteration `step` has ended."""
        self._updates += 1
        # Start at the second update: the first comes from a checkpoint or includes compilation.
        if self._updates == 2:
            self._start = (step, time.process_time())
        elif self._updates > 2 and (count := step - self._start[0]) >= FEWEST:
            self.seconds = (time.process_time() - self._start[1]) / count


def earlier_seconds(directory: Path) -> dict[tuple[str, int], float | None]:
    """The measured times of a run that is resumed, by method and seed."""
    results = directory / "results.json"
    if not (processes.is_leader() and results.exists()):
        return {}
    return {(row["method"], row["seed"]): row["cpu_seconds"] for row in read_json(results)["rows"]}
