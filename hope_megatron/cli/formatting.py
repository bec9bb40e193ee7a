"""Numbers as people read them."""

from __future__ import annotations


def count_text(value: float) -> str:
    """1_234_567 -> '1.23M'; exact below a thousand."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.3g}"


def bytes_text(value: float) -> str:
    """Bytes in decimal units, as memory sizes are sold: 8e10 -> '80.0 GB'."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if abs(value) >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def duration_text(seconds: float) -> str:
    """9_000 -> '2 h 30 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{seconds / 86400:.1f} days"


def percent_text(share: float) -> str:
    """0.1234 -> '12.3 %'."""
    return f"{100 * share:.1f} %"
