"""Progress of long work: a bar on a terminal, plain lines every few seconds in a log."""

import logging
import sys
import time
import warnings

log = logging.getLogger("temper")
LOG_EVERY_SECONDS = 10.0


class Progress:
    """Counts up to `total`. Use as a context manager; call `update(n, note)` as work is done.

    >>> with Progress(2, "tokenize", "rows") as progress:
    ...     progress.update(2)
    """

    def __init__(self, total: int | None, name: str, unit: str, initial: int = 0):
        self.total, self.name, self.unit = total, name, unit
        self.initial = self.count = initial
        self.started = self.last_line = time.monotonic()
        self.bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from tqdm import tqdm

            scaled = self.unit == "B"
            self.bar = tqdm(
                total=self.total,
                initial=self.initial,
                desc=self.name,
                unit=self.unit if scaled else f" {self.unit}",
                unit_scale=scaled,
                unit_divisor=1024,
                dynamic_ncols=True,
            )
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more; `note` is shown behind the count (a loss, a file name)."""
        self.count += n
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_EVERY_SECONDS:
            self.last_line = now
            self._line(now, note)

    def _line(self, now: float, note: str) -> None:
        elapsed = now - self.started
        rate = (self.count - self.initial) / elapsed if elapsed else 0.0
        of, left = "", ""
        if self.total:
            of = f"/{self._amount(self.total)} ({self.count / self.total:.0%})"
            left = f", {(self.total - self.count) / rate:.0f} s left" if rate else ""
        note = f"  {note}" if note else ""
        done, speed = self._amount(self.count), self._amount(rate)
        log.info("%s: %s%s%s, %s/s%s%s", self.name, done, of, self._unit, speed, left, note)

    @property
    def _unit(self) -> str:
        return "" if self.unit == "B" else f" {self.unit}"  # an amount of bytes has its unit already

    def _amount(self, count: float) -> str:
        if self.unit == "B":
            return f"{count / 2**20:.1f} MiB"
        return f"{count:.0f}" if count >= 10 or count == int(count) else f"{count:.2f}"

    def __exit__(self, kind, error, trace):
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.count != self.initial:
            seconds = time.monotonic() - self.started
            log.info("%s: %s%s in %.1f s", self.name, self._amount(self.count), self._unit, seconds)


def quiet_libraries() -> None:
    """Switch off the libraries' own bars, remarks and questions for this process: our lines say the same, once."""
    import datasets
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # never ask whether a model's own code may run: it may not
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
