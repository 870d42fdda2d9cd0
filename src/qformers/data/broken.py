"""The account of pictures that could not be used: counted, named in a log, and too many stop the run."""

from __future__ import annotations

from pathlib import Path

from qformers.data.batch import Batch
from qformers.errors import DataError

_MINIMUM_SEEN = 100


class BrokenTally:
    """Counts rows seen and rows broken, and writes each broken picture's name and reason once to `log_path`.

    `add` raises DataError when more than `limit_fraction` of the rows seen were broken, but not before 100
    rows: one bad picture in the first batch is no pattern. `check` at the end of a run judges any number.
    A log that is already there (a resumed run's) is continued. A picture counts at every visit.
    """

    def __init__(self, log_path: str | Path, limit_fraction: float = 0.01) -> None:
        self.log_path = Path(log_path)
        self.limit_fraction = limit_fraction
        self.seen = 0
        self.broken = 0
        self._named: set[str] = set()
        if self.log_path.exists():
            lines = self.log_path.read_text(encoding="utf-8").splitlines()
            self._named = {line.split("\t")[0] for line in lines}

    def add(self, batch: Batch) -> None:
        """Count one batch. Raises DataError past the limit."""
        self.seen += len(batch) + len(batch.broken)
        self.broken += len(batch.broken)
        new = {image.name: image.reason for image in batch.broken if image.name not in self._named}
        if new:
            self._named |= new.keys()
            with self.log_path.open("a", encoding="utf-8") as log:
                log.writelines(f"{name}\t{reason}\n" for name, reason in new.items())
        if self.seen >= _MINIMUM_SEEN:
            self.check()

    def check(self) -> None:
        """Raises DataError if too many of the rows seen so far were broken."""
        if self.broken > self.limit_fraction * self.seen:
            raise DataError(
                f"{self.broken} of {self.seen} rows could not be used ({self.broken / self.seen:.1%}), "
                f"the limit is {self.limit_fraction:.1%}: see {self.log_path}; mend or remove them, "
                "or raise the limit"
            )
