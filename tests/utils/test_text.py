"""Text from outside, in forms that may be shown and written."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_alexnet.utils.text import markdown, printable, read_table, write_table

FORMULAS = [
    "=HYPERLINK(1)",
    "+1",
    "-2+3",
    "@SUM(1)",
    "\tx",
    "\rx",
    "'=1",
    "''@x",
    "'plain",
    "=",
    "'",
]


def written(rows):
    file = io.StringIO(newline="")
    write_table(file, rows)
    return file.getvalue()


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_spreadsheet_computes_no_cell(cell):
    text = written([[cell, 1]])
    assert text.lstrip('"')[0] not in "=+-@\t\r"
    assert [row[0] for row in read_table(io.StringIO(text, newline=""))] == [cell]


def test_numbers_stay_numbers():
    assert written([[-1, -0.5, 1e-3]]) == "-1,-0.5,0.001\r\n"


@given(st.lists(st.lists(st.text(), min_size=1, max_size=3), max_size=4))
def test_tables_are_read_back_as_they_were(rows):
    rows = [row for row in rows if row != [""]]  # of which CSV makes an empty line
    assert list(read_table(io.StringIO(written(rows), newline=""))) == rows


@given(st.text())
def test_what_is_shown_is_one_printable_line(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert markdown(text).isprintable()


def test_markdown_shows_text_as_it_is():
    assert markdown("<img src=x>\n# [a](b) `c`") == (r"\<img src=x\>\\n\# \[a\]\(b\) \`c\`")
