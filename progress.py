"""Progress bars: on a terminal tqdm's own, in a log file a line now and then."""
import sys
import time

from tqdm import tqdm

SECONDS = 30  # between two lines in a log file


def progress_bar(iterable=None, **options) -> tqdm:
    """tqdm(iterable, **options), for standard error as it is: a terminal, or a file or pipe."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(iterable, **options)


class ProgressLines(tqdm):
    """A bar for a log file: each state is a line of its own, every SECONDS at most and at the
    end."""

    def __init__(self, iterable=None, **options):
        self.next_line = time.monotonic() + SECONDS
        super().__init__(iterable, mininterval=SECONDS, **options)

    def display(self, msg=None, pos=None) -> None:
        if self.disable:  # close() sets it before it calls; it ends the line itself
            self.fp.write(str(self) if msg is None else msg)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS
            self.fp.write(f"{self}\n")

    def clear(self, nolock: bool = False) -> None:
        """Nothing: tqdm.write() would have the bar out of its way, but here no line is
        overwritten."""
