"""Names that people or files gave, in tables and on terminals: shown as they are, and never obeyed."""

import re

# Spreadsheets compute a cell that begins so, full-width signs included; one that begins with a quote is text to them.
_FORMULA = re.compile(r"'*[=+\-@\uff1d\uff0b\uff0d\uff20]")
# Characters that may steer a terminal, and the halves of characters that stand for bytes of no known encoding.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNPRINTABLE_IN_TABLE = re.compile(_UNPRINTABLE.pattern.replace("\x0b", "\t\n\x0b"))
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable(text: str) -> str:
    r"""A message for a terminal or log: control characters other than line ends and tabs are written as ``\x1b``."""
    return _UNPRINTABLE.sub(_escape, text)


def table_cell(value: object) -> object:
    r"""A cell of a CSV table that no spreadsheet takes for a formula.

    Numbers, and texts that are numbers, stay what they are. Any other text that begins like a formula gets a quote
    before it, and control characters are written as ``\x0a``; `from_table_cell` takes both back.
    """
    if not isinstance(value, str):
        return value
    text = _UNPRINTABLE_IN_TABLE.sub(_escape, value)
    if not _FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def from_table_cell(text: str) -> str:
    """The text that `table_cell` turned into ``text``."""
    if text.startswith("'") and _FORMULA.match(text):
        text = text[1:]
    return _ESCAPE.sub(_unescape, text)


def _unescape(match: re.Match[str]) -> str:
    character = chr(int(match[1] or match[2], 16))
    return character if _UNPRINTABLE_IN_TABLE.match(character) else match[0]  # others are never written so
