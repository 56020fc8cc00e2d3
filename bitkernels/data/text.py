"""Plain text in, training and held-out text out."""

import lzma
from pathlib import Path

_SHIPPED = Path(__file__).parent / "kjv.txt.xz"

_EVERY = 20
_HELD_OUT = 10


def shipped_text() -> str:
    """The King James Bible; README.md beside this file says where it is from and what its form is."""
    return read_text(_SHIPPED)


def read_text(path: str | Path) -> str:
    """Reads UTF-8 text, compressed where the name ends in ``.xz``."""
    path = Path(path)
    open_text = lzma.open if path.suffix == ".xz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a complete xz file ({error})") from error
    if not text.strip():
        raise ValueError(f"{path}: holds no text")
    return text


def split_text(text: str) -> tuple[str, str]:
    """Training and held-out text: of every twenty documents one is held out.

    A blank line separates documents. A text of fewer than twenty documents is split by lines, and one of
    fewer than twenty lines at 95 % of its characters.
    """
    for separator in ("\n\n", "\n"):
        parts = text.strip("\n").split(separator)
        if len(parts) >= _EVERY:
            train = [part for i, part in enumerate(parts) if i % _EVERY != _HELD_OUT]
            held_out = [part for i, part in enumerate(parts) if i % _EVERY == _HELD_OUT]
            return separator.join(train) + separator, separator.join(held_out) + separator
    cut = len(text) * (_EVERY - 1) // _EVERY
    return text[:cut], text[cut:]
