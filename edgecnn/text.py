"""Text from files and the command line: what may be shown, and how. Imports no torch."""

import re

# Control characters, separators that end a line, switches of the writing direction, halves of
# surrogate pairs and non-characters: none can be right in a name, and SVG cannot hold most of them.
UNSHOWABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
NAME_LENGTH, LINE_LENGTH, TEXT_LENGTH = 200, 1000, 10_000  # characters


def is_text(value, longest: int) -> bool:
    """Whether a value is text that can be shown, of at most `longest` characters."""
    return isinstance(value, str) and len(value) <= longest and not UNSHOWABLE.search(value)


def is_name(value) -> bool:
    """Whether a value can name a variant or a layer: text to show, and the stem of a file name."""
    return is_text(value, NAME_LENGTH) and bool(value.strip()) and "/" not in value


def one_line(text: str) -> str:
    """The text as one line for a terminal: other characters escaped, the middle of a long one cut."""
    text = UNSHOWABLE.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.split()))
    half = LINE_LENGTH // 2
    return text if len(text) <= LINE_LENGTH else f"{text[:half]} ... {text[-half:]}"


def markdown_cell(text: str) -> str:
    """The text as a cell of a Markdown table: it ends no cell and starts no tag, link or code."""
    text = re.sub(r"[\\`|\[\]]", r"\\\g<0>", one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def picture_text(text: str) -> str:
    """The text for matplotlib, which would read what stands between two dollars as mathematics."""
    return text.replace("$", r"\$")
