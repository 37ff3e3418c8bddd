"""Format text for messages: durations, counts, and names that hold unprintable characters."""

from collections.abc import Sequence

ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def format_duration(seconds: float) -> str:
    """Format seconds as ``1h02m``, ``3m05s`` or ``12s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def pluralize(count: int, noun: str, plural: str = "") -> str:
    """A count and its noun: ``1 image``, ``2 images``. ``plural`` is needed if it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def join(parts: Sequence[str], word: str = "and") -> str:
    """The parts as a list in a sentence: ``a, b and c``."""
    return f" {word} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def escape(text: object) -> str:
    r"""Text on one line, of printable characters only. Others are written as in TOML and JSON, such as ``\u001b``.

    Control characters, line ends, and marks that change the writing direction are not printable. A byte of a path that
    is not UTF-8 is written ``\xff``.
    """
    line = str(text)
    return line if line.isprintable() else "".join(each if each.isprintable() else _escape(each) for each in line)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python represents it in a path
        return f"\\x{code & 0xFF:02x}"
    return ESCAPES.get(character, f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
