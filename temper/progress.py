"""Progress of long work: a bar on a terminal, plain lines every few seconds in a log."""

import logging
import sys
import time
import warnings

from temper.units import seconds

log = logging.getLogger("temper")
LOG_EVERY_SECONDS = 10.0
WITH_TOTAL = "{desc}: {n_fmt}/{total_fmt}{unit} ({percentage:.0f}%), {rate_noinv_fmt}, {remaining} left{postfix}"
WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}{postfix}"
DONE = "{desc}: {n_fmt}{unit} in {took}"


class Progress:
    """Counts up to `total`. Use as a context manager; call `update(n, note)` as work is done.

    >>> with Progress(2, "tokenize", "rows") as progress:
    ...     progress.update(2)
    """

    def __init__(self, total: int | None, name: str, unit: str, initial: int = 0):
        self.total, self.name = total, name
        self.initial = self.count = initial
        scaled = unit == "B"
        self.amounts = {"unit": unit if scaled else f" {unit}", "unit_scale": scaled, "unit_divisor": 1024}
        self.started = self.last_line = time.monotonic()
        self.bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, initial=self.initial, desc=self.name, dynamic_ncols=True, **self.amounts)
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more; `note` is shown behind the count (a loss, a file name)."""
        self.count += n
        if self.bar is not None:
            self.bar.total = self.total  # of a download it is known when the first bytes come
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_EVERY_SECONDS:
            self.last_line = now
            self._line(WITH_TOTAL if self.total else WITHOUT_TOTAL, note)

    def _line(self, form: str, note: str = "") -> None:
        """Log a line in the words of tqdm's bar."""
        from tqdm import tqdm

        elapsed = time.monotonic() - self.started
        text = tqdm.format_meter(
            self.count,
            self.total,
            elapsed,
            prefix=self.name,
            postfix=note,
            initial=self.initial,
            bar_format=form,
            took=seconds(elapsed),
            **self.amounts,
        )
        log.info("%s", " ".join(text.split()))  # tqdm aligns rates with blanks

    def __exit__(self, kind, error, trace):
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.count != self.initial:
            self._line(DONE)


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
