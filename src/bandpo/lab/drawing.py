"""Parts of SVG figures for the documentation: colours for light and dark pages, and a width that fits a phone."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import MappingProxyType

WIDTH = 480
"""Width of a figure; a phone shows it at three quarters of its size."""

STYLE = """\
<style>
  text { font: 13px system-ui, sans-serif; fill: #1f2430 }
  .title { font-weight: 600; font-size: 15px }
  .note { fill: #525a6b; font-size: 12px }
  .mid { text-anchor: middle } .end { text-anchor: end }
  .axis { stroke: #8892a6; stroke-width: 1; fill: none } .zero { stroke: #525a6b; stroke-width: 1.4 }
  .tile { stroke: #ffffff; stroke-width: 2 } .zone { fill: #eceff5 }
  .none { fill: #e3e6ee } .on { fill: #ffffff; font-weight: 600; font-size: 12px }
  .c0 { --c: #6f7b95 } .c1 { --c: #0b7a75 } .c2 { --c: #b54708 } .c3 { --c: #2f55d4 } .c4 { --c: #8a3ffc } .c5 { --c: #a61b4a }
  .c6 { --c: #7a5c00 } .c7 { --c: #1f2430 }
  .dot { fill: var(--c) } .line { stroke: var(--c); stroke-width: 2; fill: none } .open { fill: #ffffff; stroke: var(--c);
    stroke-width: 1.6 } .tinted { fill: var(--c) } .dash { stroke-dasharray: 5 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8eaf0 } .note { fill: #aab2c4 } .axis { stroke: #6f7b95 } .zero { stroke: #aab2c4 }
    .tile { stroke: #1b1f2b } .zone { fill: #2a3042 } .none { fill: #2d3344 } .open { fill: #1b1f2b } .on { fill: #ffffff }
    .line, .dot, .open { --c: var(--d, var(--c)) }
    .c0 { --d: #aab2c4 } .c1 { --d: #4fd1c5 } .c2 { --d: #ffa94d } .c3 { --d: #8ea2ff } .c4 { --d: #c9a2ff }
    .c5 { --d: #ff8fab } .c6 { --d: #e0c060 } .c7 { --d: #e8eaf0 }
  }
</style>"""
"""Classes of the parts; c0 to c7 are colours, of which `dot`, `open`, `line` and `tinted` take one."""

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "grpo": "c0",
        "bandpo-kl-upper": "c1",
        "bandpo-kl-lower": "c2",
        "bandpo-kl": "c3",
        "clip-higher": "c4",
        "no-clip": "c5",
        "neutral": "c6",
        "dcpo": "c7",
    }
)
"""The class of the colour of an arm, the same in every figure."""

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "grpo": "fixed clip",
        "bandpo-kl-upper": "upper half",
        "bandpo-kl-lower": "lower half",
        "bandpo-kl": "whole band",
        "clip-higher": "Clip-Higher",
        "no-clip": "no clip",
    }
)
"""The name of an arm in a figure, where it differs from the arm's own."""


def picture(title: str, height: float, parts: Sequence[str]) -> str:
    """A whole SVG file.

    Args:
        title: What it shows, for readers who do not see it.
        height: Height, in the same units as `WIDTH`.
        parts: Elements.
    """
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img"'
    return "\n".join([f'{head} aria-label="{escape(title)}">', STYLE, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, style: str = "") -> str:
    """A line of text.

    Args:
        x: Where it begins; its middle or end with the classes `mid` and `end`.
        y: The base line.
        words: The text.
        style: Classes, separated by spaces.
    """
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(words)}</text>'


def line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    """A straight line.

    Args:
        x0: Where it begins.
        y0: Where it begins.
        x1: Where it ends.
        y1: Where it ends.
        style: Classes.
    """
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{style}"/>'


def dot(x: float, y: float, style: str) -> str:
    """A dot.

    Args:
        x: The middle.
        y: The middle.
        style: Classes.
    """
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{style}"/>'


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    """A rectangle.

    Args:
        x: Left side.
        y: Upper side.
        width: The width.
        height: The height.
        style: Classes.
    """
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{style}"/>'


def scale(low: float, high: float, left: float, right: float) -> Callable[[float], float]:
    """The function from values to places; values beyond an end are put at the end.

    Args:
        low: Value at the left.
        high: Value at the right.
        left: Place of `low`.
        right: Place of `high`.
    """
    return lambda value: left + (min(max(value, low), high) - low) / (high - low) * (right - left)
