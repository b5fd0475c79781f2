"""Progress reporting of a run."""

import sys
import time

from maml_jax.parallel import processes


class Progress:
    """Shows the step, the rate and the remaining time: as a bar on a terminal, and as lines otherwise.

    Args:
      total: steps of the run.
      name: the name of the run.
      every: seconds between lines.
    """

    def __init__(self, total: int, name: str, every: float = 15.0):
        from tqdm import tqdm

        self._total, self._name, self._every = total, name, every
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=name, unit="step", disable=not (on_terminal and processes.is_leader()))
        self._shown = time.monotonic()
        self._updates = 0
        self._since = (0, self._shown)

    def update(self, step: int, **values: float) -> None:
        """Reports that `step` steps are done, and shows `values`."""
        now = time.monotonic()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        steps, seconds = step - self._since[0], now - self._since[1]
        rate = steps / seconds if self._updates and steps and seconds else None
        self._updates += 1
        # Measure the rate from the second update on. The time before the first update includes compilation. In a
        # resumed run, the first update reports the restored step, and the time before the second includes compilation.
        if self._updates <= 2:
            self._since = (step, now)
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown >= self._every or step == self._total:
            self._shown = now
            left = "" if rate is None else f"{rate:,.1f} a second, {_duration((self._total - step) / rate)} left, "
            print(f"{self._name}: {step:,}/{self._total:,} steps, {left}{shown}", flush=True)
        if step == self._total:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
