"""Format numbers and names for messages."""


def format_duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m05s or 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def pluralize(count: int, noun: str, plural: str = "") -> str:
    """A count and its noun: ``1 image``, ``2 images``. ``plural`` is needed if it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
