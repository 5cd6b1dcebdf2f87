"""The page of a fit: the front of bytes and time, and memory over the step of each choice."""

import html
import os
from collections.abc import Iterator

from packlight._files import write_text
from packlight.planner.fit import Fit
from packlight.planner.result import where
from packlight.planner.timeline import Segment, Timeline
from packlight.report.words import human_bytes

_WIDTH, _HEIGHT, _EDGE = 900, 240, 60
_COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd", "#d62728")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: auto } text { font-size: 11px } .bar:hover { fill: #d62728 }
pre { background: #f4f4f4; padding: .5rem; overflow: auto }
"""


def write_fit(fit: Fit, path: str | os.PathLike[str]) -> None:
    """Write one file that needs no other and no network."""
    parts = [
        "<!doctype html><meta charset='utf-8'>",
        f"<title>{html.escape(fit.title)}</title><style>{_STYLE}</style>",
        f"<h1>Does it fit?</h1><pre>{html.escape(str(fit))}</pre>",
        "<h2>Bytes and time</h2>",
        "".join(_front(fit)),
        "<h2>Memory over a step</h2><p>A bar is what runs in one place in a row, or the highest of"
        " those in a pixel; its height is the most that is allocated meanwhile. Point at one to"
        " read where it is.</p>",
    ]
    top = 1.05 * max([fit.usable, *(timeline.peak for timeline in fit.timelines.values())])
    for name, timeline in fit.timelines.items():
        parts.append(f"<h3>{html.escape(name)}</h3>")
        parts.extend(_over_time(timeline, top, fit.usable))
    write_text(path, "\n".join(parts) + "\n")


def _svg(body: str) -> str:
    size = f"0 0 {_WIDTH + 2 * _EDGE} {_HEIGHT + 2 * _EDGE // 2}"
    return f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='{size}'>{body}</svg>"


def _front(fit: Fit) -> Iterator[str]:
    most_ms = 1.1 * max(row.ms for row in fit.rows)
    top = 1.1 * max([fit.usable, *(row.peak for row in fit.rows)])

    def x(ms: float) -> float:
        return _EDGE + _WIDTH * ms / max(most_ms, 1e-9)

    def y(size: float) -> float:
        return 10 + _HEIGHT * (1 - size / top)

    body = _axes("ms a step", f"{most_ms:.0f}", human_bytes(int(top))) + _limit(y(fit.usable))
    for colour, row in zip(_COLOURS, fit.rows, strict=False):
        at = f"cx='{x(row.ms):.1f}' cy='{y(row.peak):.1f}'"
        body += f"<circle {at} r='5' fill='{colour}'/>"
        label = f"{row.name}: {human_bytes(row.peak)}, {row.ms:.0f} ms"
        body += (
            f"<text x='{x(row.ms) + 8:.1f}' y='{y(row.peak) - 6:.1f}'>{html.escape(label)}</text>"
        )
    yield _svg(body)


def _over_time(timeline: Timeline, top: float, usable: int) -> Iterator[str]:
    """Bars as wide as the time that each takes."""
    total = sum(max(segment.device_ms, segment.host_ms) for segment in timeline.segments)
    body = _axes("time of a step", "", human_bytes(int(top)))
    now = 0.0
    for segment, ms in _bars(timeline, total / _WIDTH):
        size = timeline.static + segment.peak
        left, wide = _EDGE + _WIDTH * now / max(total, 1e-9), _WIDTH * ms / max(total, 1e-9)
        now += ms
        high = _HEIGHT * size / top
        title = (
            f"{where(segment.phase, segment.place)}: {human_bytes(size)} while {segment.operator}"
        )
        body += (
            f"<rect class='bar' x='{left:.2f}' y='{10 + _HEIGHT - high:.2f}'"
            f" width='{max(wide, 0.3):.2f}' height='{high:.2f}' fill='{_SHADES[segment.phase]}'>"
            f"<title>{html.escape(title)}</title></rect>"
        )
    yield _svg(body + _limit(10 + _HEIGHT * (1 - usable / top)))


def _bars(timeline: Timeline, pixel: float) -> Iterator[tuple[Segment, float]]:
    """Segments with their time; of those that share a pixel the one with the highest peak."""
    highest: Segment | None = None
    ms = 0.0
    for segment in timeline.segments:
        if highest is not None and (ms >= pixel or segment.phase != highest.phase):
            yield highest, ms
            highest, ms = None, 0.0
        ms += max(segment.device_ms, segment.host_ms)
        if highest is None or segment.peak > highest.peak:
            highest = segment
    if highest is not None:
        yield highest, ms


_SHADES = {"forward": "#1f77b4", "backward": "#ff7f0e", "optimizer": "#2ca02c"}


def _axes(below: str, right: str, top: str) -> str:
    bottom = 10 + _HEIGHT
    return (
        f"<path d='M{_EDGE} 10V{bottom}H{_EDGE + _WIDTH}' fill='none' stroke='#333'/>"
        f"<text x='4' y='18'>{top}</text><text x='{_EDGE}' y='{bottom + 16}'>{below}</text>"
        f"<text x='{_EDGE + _WIDTH - 20}' y='{bottom + 16}'>{right}</text>"
    )


def _limit(y: float) -> str:
    return (
        f"<path d='M{_EDGE} {y:.1f}H{_EDGE + _WIDTH}' stroke='#d62728' stroke-dasharray='6 4'/>"
        f"<text x='{_EDGE + 4}' y='{y - 4:.1f}' fill='#d62728'>what the card has for tensors</text>"
    )
