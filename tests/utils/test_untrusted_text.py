"""Names of files and classes that would be computed by a spreadsheet, or steer a terminal."""

import csv
import io

import pytest

from dinov2.utils.untrusted_text import from_table_cell, printable, table_cell

HARMLESS = ["", "parts/1.png", "-1", "+0.5e3", "-inf", "'quoted'", "a=b", "Störung 部品", "x\\y", "C:\\x64\\u00e9"]
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\uff1d1", "'=1", "''=1"]
STEERING = ["a\nb", "\t=1", "a\x1b[2Jb", "\r=1", "\x00", "bytes\udcff", "right\u202eto left"]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_cells_stay_what_they_are(text: str) -> None:
    assert table_cell(text) == text == from_table_cell(text)


def test_numbers_stay_numbers() -> None:
    assert [table_cell(value) for value in (-1, 0.5, None)] == [-1, 0.5, None]


@pytest.mark.parametrize("text", [*FORMULAS, *STEERING])
def test_no_cell_is_a_formula_or_steers_and_all_are_read_back(text: str) -> None:
    file = io.StringIO()
    csv.writer(file).writerow([table_cell(text)])
    file.getvalue().encode()
    ((cell,),) = csv.reader(io.StringIO(file.getvalue()))
    assert cell[:1] not in tuple("=+-@\uff1d\uff0b\uff0d\uff20\t\r\n")
    assert cell.isprintable()
    assert from_table_cell(cell) == text


def test_a_message_keeps_its_lines_and_steers_no_terminal() -> None:
    assert printable("a\nb\tc é") == "a\nb\tc é"
    assert printable("a\x1b[2Jb\rc\x9b\udcff") == r"a\x1b[2Jb\x0dc\x9b\udcff"
