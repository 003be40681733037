"""Tables of the documents from the measurements beside this file, so that each number has one place.

python docs/measurements/tables.py [--check]

A document holds a table between two comments; the first says what is in it::

    <!-- measured: matmul.csv matmul rows="4096 x 4096, 1; 4096 x 4096, 16" columns="ours; ours / floor" -->
    <!-- end -->

``rows`` and ``columns`` select and order; without them all are taken as they come. A column "a / b" that no measurement
has is the ratio of two that are measured. Below a table stands where its numbers come from: card, date, versions, the
commit that recorded them, command. Cells from elsewhere than most are marked and listed.
"""

import argparse
import collections
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS = ("table", "row", "column", "value", "unit", "card", "date", "commit", "versions", "command")
MARKED = re.compile(
    r'(?P<head><!-- measured: (?P<file>[\w.-]+) (?P<table>[\w-]+)(?: rows="(?P<rows>[^"]*)")?'
    r'(?: columns="(?P<columns>[^"]*)")? -->\n).*?(?P<end><!-- end -->)',
    re.DOTALL,
)


class Source(NamedTuple):
    """Where a number was measured."""

    card: str
    date: str
    commit: str
    versions: str
    command: str

    def __str__(self) -> str:
        parts = [self.card, self.date, self.versions, self.commit and f"commit {self.commit}"]
        return ", ".join(part for part in parts if part) + (f": `{self.command}`" if self.command else "")


class Cell(NamedTuple):
    """One number, or several of the same thing."""

    value: str
    unit: str
    source: Source


Table = dict[str, dict[str, Cell]]


def read(path: Path) -> dict[str, Table]:
    """Table -> row -> column -> cell, in the file's order.

    Raises:
        ValueError: for other columns than ``COLUMNS``, empty names or values, and a cell that is there twice.
    """
    tables: dict[str, Table] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}; expected {COLUMNS}")
        for line in reader:
            if not all(line[name] for name in ("table", "row", "column", "value", "card", "date", "commit")):
                raise ValueError(f"{path}:{reader.line_num} lacks a field: {line}")
            row = tables.setdefault(line["table"], {}).setdefault(line["row"], {})
            if line["column"] in row:
                raise ValueError(f"{path}:{reader.line_num}: {line['row']!r}, {line['column']!r} is there already")
            row[line["column"]] = Cell(line["value"], line["unit"], Source(*(line[name] for name in Source._fields)))
    return tables


def markdown(table: Table, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None) -> str:
    """The table and its sources.

    Raises:
        ValueError: for a row or a column that is not there.
    """
    measured = list(dict.fromkeys(column for row in table.values() for column in row))
    rows, columns = list(table) if rows is None else rows, measured if columns is None else columns
    parts = {column: [column] if column in measured else column.split(" / ") for column in columns}
    for known, names in ((list(table), rows), (measured, [part for named in parts.values() for part in named])):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{unknown[0]!r} is not measured; expected one of {known}")
    cells = {
        column: [table[row][part] for row in rows for part in named if part in table[row]]
        for column, named in parts.items()
    }
    sources = _by_count([cell.source for found in cells.values() for cell in found])
    # Of a column most of whose numbers come from elsewhere the heading says so, not each cell.
    usual = {column: _by_count([cell.source for cell in found])[0] for column, found in cells.items()}

    def mark(source: Source) -> str:
        return f" ({number})" if (number := sources.index(source)) else ""

    def heading(column: str) -> str:
        if column not in measured:
            return column
        units = {cell.unit for cell in cells[column]} - {""}
        return ", ".join([column, *units]) + mark(usual[column])

    def shown(row: dict[str, Cell], column: str) -> str:
        found = [row[part] for part in parts[column] if part in row]
        if len(found) < len(parts[column]):
            return "-"
        if len(found) == 2:
            return f"{float(found[0].value) / float(found[1].value):.2f}"
        value, _, source = found[0]
        return _grouped(value) + ("" if source == usual[column] else mark(source) or " (0)")

    lines = [f"| | {' | '.join(map(heading, columns))} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(shown(table[name], column) for column in columns)} |" for name in rows]
    first = "(0) " if any("(0)" in line for line in lines) else ""
    notes = [(f"({number}) " if number else first) + str(source) for number, source in enumerate(sources)]
    return "\n".join([*lines, "", "; ".join(notes)])


def _by_count(sources: Sequence[Source]) -> list[Source]:
    return [source for source, _ in collections.Counter(sources).most_common()]


def _grouped(value: str) -> str:
    return f"{int(value):,}" if value.isdecimal() and int(value) >= 10_000 else value


def filled(text: str, folder: Path = HERE) -> str:
    """A document with its tables as the measurements in ``folder`` have them."""

    def names(text: str | None) -> list[str] | None:
        return None if text is None else [name.strip() for name in text.split(";")]

    def table(match: re.Match[str]) -> str:
        tables = read(folder / match["file"])
        content = markdown(tables[match["table"]], names(match["rows"]), names(match["columns"]))
        return f"{match['head']}{content}\n{match['end']}"

    return MARKED.sub(table, text)


def documents() -> list[Path]:
    """All files that may hold tables."""
    pages = (page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts)
    return [ROOT / "README.md", *pages]


def main() -> int:
    """Write the tables, or with ``--check`` only say which are not as measured; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is to be written")
    check, code = parser.parse_args().check, 0
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'is not as measured' if check else 'written'}")
        code = int(check)
        if not check:
            path.write_text(new, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
