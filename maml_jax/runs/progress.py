"""Progress reporting of a run."""

import sys
import time

from maml_jax.parallel import processes


class Progress:
    """Shows the step, the rate and the remaining time: a bar on a terminal, otherwise lines.

    Args:
      total: steps of the run.
      name: the name of the run.
      every: seconds between lines.
    """

    def __init__(self, total: int, name: str, every: float = 15.0):
        from tqdm import tqdm

        self._total, self._name, self._every = total, name, every
        self._bar = tqdm(
            total=total, desc=name, unit="step", disable=not (sys.stderr.isatty() and processes.is_leader())
        )
        self._start = self._shown = time.monotonic()
        self._updates = 0
        self._first = (0, self._start)

    def update(self, step: int, **values: float) -> None:
        """Reports that `step` steps are done, and shows `values`."""
        now = time.monotonic()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._updates += 1
        # Measure the rate after the call that compiles: the first call, or the second in a run that resumes.
        if self._updates <= 2:
            self._first = (step, now)
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown >= self._every or step == self._total:
            self._shown = now
            steps, seconds = step - self._first[0], now - self._first[1]
            rate = steps / seconds if steps else 0.0
            left = f"{_duration((self._total - step) / rate)} left" if rate else "rate not known yet"
            print(f"{self._name}: {step:,}/{self._total:,} steps, {rate:,.1f} a second, {left}, {shown}", flush=True)
        if step == self._total:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
