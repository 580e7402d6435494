"""What the log of a job says: its last line, and how the job ended."""

from pathlib import Path

ENDS = ("error: ", "interrupted")  # how a step's last line begins, if it ended without its output
TRACEBACK = "Traceback (most recent call last)"


class Log:
    """The log at `path`, as it is now; a file that is not there is an empty log."""

    def __init__(self, path: Path):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            text = ""
        self.lines = [line for line in text.splitlines() if line.strip()]
        self.last = self.lines[-1] if self.lines else ""
        self.tells_end = self.last.startswith(ENDS) or TRACEBACK in text

    @property
    def end(self) -> str:
        """Why the job ended: the last line, unless it was killed before it wrote one."""
        if self.tells_end:
            return self.last
        return (
            "killed from outside: by a person, or by the system because memory ran out (then lower "
            "train.per_device_train_batch_size, or run with fewer --cores); its last line was: "
            f"{self.last or '(nothing)'}"
        )
