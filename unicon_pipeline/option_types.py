"""Types of command line options: text in, value out.

A bad value ends the command before any work, with a message that argparse puts the option's name to.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from pathlib import Path


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def seed_number(text: str) -> int:
    """A whole number from 0 to 2**32 - 1, the range every random generator here takes."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise ArgumentTypeError(f"expected a whole number from 0 to {2**32 - 1}, found {text!r}")
    return int(text)


def fold_choice(text: str) -> int | str:
    """`all`, or the number of the fold to hold out."""
    if text == "all":
        return text
    return fold_number(text)


def fold_number(text: str) -> int:
    """The number of a fold."""
    if not text.isascii() or not text.isdigit():
        raise ArgumentTypeError(f"expected the number of a fold (0, 1, ...), found {text!r}")
    return int(text)


def orientation_code(text: str) -> str:
    """Three letters, one of each pair R/L, A/P, I/S, such as RAS."""
    code = text.upper()
    pairs = {"R": 0, "L": 0, "A": 1, "P": 1, "I": 2, "S": 2}
    if len(code) != 3 or {pairs.get(letter) for letter in code} != {0, 1, 2}:
        raise ArgumentTypeError(f"expected one letter of R/L, one of A/P, one of I/S, such as RAS; found {text!r}")
    return code


def existing_path(text: str) -> Path:
    """A file or folder that is there."""
    path = Path(text).expanduser()
    if not path.exists():
        raise ArgumentTypeError(f"{text} does not exist")
    return path


def existing_folder(text: str) -> Path:
    """A folder that is there."""
    path = existing_path(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"{text} is not a folder")
    return path


def output_folder(text: str) -> Path:
    """A folder that is there or can be made: no file is in its place."""
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise ArgumentTypeError(f"{text} is a file, a folder was expected")
    return path
