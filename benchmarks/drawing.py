"""Bars with their spread, as SVG: one group a kind of loss, one bar a contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

Bar = tuple[str, float, float, float]  # name, median, lowest, highest

_WIDTH, _LEFT, _ROW, _BAR, _RIGHT = 760, 240, 24, 14, 90
_COLOURS = {"(a)": "#b0b0b0", "(b)": "#909090", "(c)": "#d08a3c", "(d)": "#8db7d8", "(e)": "#2f6f9f"}


def draw(groups: Mapping[str, Sequence[Bar]]) -> str:
    """Tokens a second from the second epoch on."""
    most = max(high for bars in groups.values() for _, _, _, high in bars)
    parts: list[str] = []
    y = 20
    for title, bars in groups.items():
        parts.append(
            f'<text x="10" y="{y}" font-weight="bold">{escape(title)}, tokens/s from the second epoch on</text>'
        )
        y += _ROW // 2
        for bar in bars:
            parts += _bar(bar, y, (_WIDTH - _LEFT - _RIGHT) / most)
            y += _ROW
        y += _ROW
    style = "font-family:sans-serif;font-size:12px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" style="{style}">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{y}" fill="white"/>', *parts, "</svg>", ""])


def _bar(bar: Bar, y: int, scale: float) -> list[str]:
    name, middle, low, high = bar
    centre, text = y + _BAR / 2, y + _BAR - 3
    return [
        f'<text x="{_LEFT - 8}" y="{text}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{_LEFT}" y="{y}" width="{middle * scale:.1f}" height="{_BAR}" fill="{_COLOURS[name[:3]]}"/>',
        f'<path d="M{_LEFT + low * scale:.1f} {centre}H{_LEFT + high * scale:.1f}" stroke="black"/>',
        f'<text x="{_LEFT + high * scale + 6:.1f}" y="{text}">{middle:,.0f}</text>',
    ]
