"""What the first rank shows: a bar while it trains, then the loss curve and a table."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import plotille
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Report:
    """Output of the first rank; the others are given `quiet=True` and say nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else 110)
        self._bar = self._console.is_terminal and not quiet

    def say(self, line: str) -> None:
        """One line of text."""
        self._console.print(line, markup=False, soft_wrap=True)

    def steps(self, start: int, stop: int, losses: Sequence[float]) -> Iterator[int]:
        """Yield the steps from `start` to `stop`, with a bar, or ten lines where there is no terminal.

        `losses` is read after each step: its last entry is shown.
        """
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        every = max(1, (stop - start) // 10)
        with Progress(*columns, console=self._console, disable=not self._bar) as progress:
            task = progress.add_task("", total=stop, completed=start, loss="-")
            for step in range(start, stop):
                yield step
                progress.update(task, advance=1, loss=f"{losses[-1]:.4f}")
                if not self._bar and ((step + 1 - start) % every == 0 or step + 1 == stop):
                    self.say(f"step {step + 1:>5} of {stop}   loss {losses[-1]:.4f}")

    def curve(self, start: int, losses: Sequence[float]) -> None:
        """The loss over the steps, drawn with text."""
        if len(losses) < 2:
            return
        figure = plotille.Figure()
        figure.width, figure.height, figure.with_colors = 60, 10, False
        figure.x_label, figure.y_label = "step", "loss"
        figure.register_label_formatter(float, _label)
        figure.x_ticks_fkt = lambda low, _high: f"{low:.0f}"
        low, high = min(losses), max(losses)
        room = (high - low) * 0.05 or 1.0
        figure.set_y_limits(low - room, high + room)
        figure.set_x_limits(start, start + len(losses))
        figure.plot([float(start + 1 + i) for i in range(len(losses))], list(losses))
        self.say(figure.show())

    def table(self, title: str, columns: Sequence[str], rows: Mapping[str, Iterable[str]]) -> None:
        """A table with a name for each row; `columns` leaves out the first."""
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for name, cells in rows.items():
            table.add_row(name, *cells)
        self._console.print(table)


def _label(val: float, chars: int, delta: float, left: bool = False) -> str:
    text = f"{val:.2f}"
    return text.ljust(chars) if left else text.rjust(chars)


def megabytes(count: int) -> str:
    """Bytes as megabytes, for people: 12.3 MB."""
    return f"{count / 1e6:.1f} MB"


def ranks(count: int) -> str:
    """How many ranks, in words: 1 rank, 2 ranks."""
    return f"{count} rank" if count == 1 else f"{count} ranks"
