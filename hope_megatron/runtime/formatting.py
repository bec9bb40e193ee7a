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
    """<1s, 45s, 12m 05s, 3h 20m, 2d 04h."""
    if 0 < seconds < 0.5:
        return "<1s"
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def seconds_text(seconds: float) -> str:
    """1.23 -> '1.23 s', '45.6 ms', '78 us'."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def percent_text(share: float) -> str:
    """0.1234 -> '12.3 %'."""
    return f"{100 * share:.1f} %"
