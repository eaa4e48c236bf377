"""Plots for Prefect's UI, as SVG in a data URL: an image artifact needs a URL, and no file server is available."""

import base64

import numpy as np

_WIDTH, _HEIGHT, _MARGIN, _BINS = 640, 240, 34, 40
_HELPS, _HARMS = "#0072b2", "#d55e00"  # distinguishable with colour blindness


def histogram(values: np.ndarray, threshold: float, title: str) -> str:
    """Return the data URL of a histogram; bars above `threshold` have the colour of helpful examples.

    Args:
        values: [examples].
        threshold: position of the vertical line.
        title: title of the plot.
    """
    low, high = float(min(values.min(), threshold)), float(max(values.max(), threshold))
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high) if high > low else (low - 1e-9, high + 1e-9))
    step = (_WIDTH - 2 * _MARGIN) / _BINS
    scale = (_HEIGHT - 2 * _MARGIN) / max(1, counts.max())

    def x_of(value: float) -> float:
        return _MARGIN + float(value - edges[0]) / float(edges[-1] - edges[0]) * (_WIDTH - 2 * _MARGIN)

    bars = [
        f'<rect x="{_MARGIN + number * step:.1f}" y="{_HEIGHT - _MARGIN - count * scale:.1f}" width="{step - 1:.1f}" '
        f'height="{count * scale:.1f}" fill="{_HELPS if (left + right) / 2 > threshold else _HARMS}"/>'
        for number, (count, left, right) in enumerate(zip(counts, edges, edges[1:], strict=False))
    ]
    base, line = _HEIGHT - _MARGIN, x_of(threshold)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_MARGIN}" y="18" font-size="14">{title}</text>{"".join(bars)}'
        f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{base}" y2="{base}" stroke="black"/>'
        f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{_MARGIN}" y2="{base}" stroke="black" stroke-dasharray="4"/>'
        f'<text x="{line + 4:.1f}" y="{_MARGIN}">threshold {threshold:.2e}</text>'
        f'<text x="{_MARGIN}" y="{base + 18}">{edges[0]:.2e}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{base + 18}" text-anchor="end">{edges[-1]:.2e} nats</text></svg>'
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
