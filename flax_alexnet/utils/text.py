"""Makes text from outside, such as names in files, safe to print and to write.

Names of files, classes and sources may hold anything: what clears a terminal, what a spreadsheet
takes for a formula, what a page shows as an image. Readers make them `printable` where they come
in, so that every message is one line. Tables and Markdown have rules of their own.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

# A spreadsheet computes a cell that begins so; quotes before it are those of an earlier writer.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def printable(text: str) -> str:
    """The text in one line as any terminal and file takes it, with escapes for the rest."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1].replace("udc", "x") for c in text)


def write_table(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV; a text that a spreadsheet would compute gets a quote before it."""
    csv.writer(file).writerows([_harmless(cell) for cell in row] for row in rows)


def read_table(file: TextIO) -> Iterator[list[str]]:
    """The rows that `write_table` wrote, with every text as it was."""
    for row in csv.reader(file):
        yield [cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell for cell in row]


def markdown(text: str) -> str:
    """The text in one line that Markdown, and HTML within it, show as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|&~$:@])", r"\\\1", printable(text))


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell
