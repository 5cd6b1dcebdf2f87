"""The page of a fit: the front of bytes and time, and memory over the step of each choice.

Pages of reports have the latter too (`steps`).
"""

import html
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from packlight._files import write_text
from packlight.planner.fit import Fit, Row
from packlight.planner.result import peak_parts, where
from packlight.planner.timeline import BACKWARD, FORWARD, STEP, Segment, Timeline
from packlight.report.words import human_bytes

_ACROSS, _UP = 1000, 100  # units of a drawing, which is stretched to what there is of the page
_GIB = 2**30

_PAGE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --faint: #666; --line: #ccc;
 --box: #f4f4f4 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e6e6; --faint: #a0a0a0;
 --line: #444; --box: #20252a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem;
 background: var(--page); color: var(--ink) }
h1 { font-size: 1.6rem } p { margin: .4rem 0; overflow-wrap: anywhere }
.faint { color: var(--faint) }
.wide { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: .15rem .7rem .15rem 0; text-align: right;
 white-space: nowrap; border-bottom: 1px solid var(--line) } td:first-child, th:first-child
 { text-align: left; white-space: normal; min-width: 7rem }
.no { color: var(--limit) } pre { background: var(--box); padding: .5rem; overflow-x: auto }
"""
# Of drawings, on a page that has --page, --ink, --faint and --line. Shapes are stretched, so text
# is not theirs: it lies above, at shares of the width and the height.
_DRAWN = """
:root { --limit: #c62828; --weights: #9aa5b1; --optimizer: #c2b280; --other: #b39ddb;
 --kept: #1f77b4; --working: #ff9f43; --front: #2e9e5b }
@media (prefers-color-scheme: dark) { :root { --limit: #ff6b6b; --weights: #66727f;
 --optimizer: #8d8056; --other: #7e6bab; --kept: #4a9fe0; --working: #ffb366; --front: #5fd08c } }
h2 { font-size: 1.2rem; margin-top: 2rem } h3 { margin: 1.5rem 0 .3rem }
.drawn { margin: 1.2rem 0 0 3.6rem; position: relative; height: 11rem; border: solid var(--line);
 border-width: 0 0 1px 1px; touch-action: pan-y }
.drawn:focus-visible { outline: 3px solid var(--kept); outline-offset: 3px }
.drawn svg { position: absolute; width: 100%; height: 100%; overflow: visible }
.drawn span { position: absolute; font-size: .75rem; line-height: 1; white-space: nowrap }
.y { right: 100%; margin-right: .35rem; transform: translateY(50%) }
.x { top: 100%; margin-top: .3rem; transform: translateX(-50%) }
.drawn .dot { padding: .2rem .35rem; border-radius: .6rem; transform: translate(-50%, 50%);
 background: var(--ink); color: var(--page) }
.peak { transform: translate(-50%, -.2rem) }
.drawn .limit { color: var(--limit); right: 0; margin-bottom: .2rem; padding: .1rem .2rem;
 background: var(--page) }
.cursor { top: 0; bottom: 0; width: 1px; background: var(--ink); display: none }
.read { min-height: 3em; margin: 1.6rem 0 0 3.6rem; font-size: .85rem }
.key i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 .8rem }
@media (max-width: 40rem) { .drawn { margin-left: 2.8rem; height: 9rem } .read { margin-left: 0 } }
"""
_SCRIPT = """
const said = (mib) => mib < 1000 ? `${mib.toPrecision(3)} MiB` : `${(mib / 1024).toFixed(2)} GiB`;
for (const figure of document.querySelectorAll(".drawn[data-bars]")) {
  const { ends, bars, names, floor } = JSON.parse(figure.dataset.bars);
  const read = figure.nextElementSibling, cursor = figure.querySelector(".cursor");
  let at = -1;
  const show = (index, share) => {
    at = index;
    const [place, before, working] = bars[at];
    cursor.style.display = "block";
    cursor.style.left = 100 * share + "%";
    read.textContent = `${names[place]}: ${said(floor + before + working)}, of which kept and ` +
      `gradients ${said(before)}, working set ${said(working)}`;
  };
  const point = (event) => {
    const box = figure.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    show(Math.max(ends.findIndex((end) => 1000 * share <= end), 0), share);
  };
  figure.addEventListener("pointermove", point);
  figure.addEventListener("pointerdown", point);
  figure.addEventListener("keydown", (event) => {
    const by = {ArrowRight: 1, ArrowLeft: -1}[event.key] * (event.shiftKey ? 20 : 1);
    if (!by) return;
    event.preventDefault();
    const index = Math.min(Math.max(at + by, 0), ends.length - 1);
    show(index, ((index ? ends[index - 1] : 0) + ends[index]) / 2000);
  });
}
"""


def write_fit(fit: Fit, path: str | os.PathLike[str]) -> None:
    """Write one file that needs no other and no network."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(fit.title)}</title><style>{_PAGE}</style>",
        f"<h1>Does it fit?</h1><p>{html.escape(fit.title)}</p>",
        f"<p>{html.escape(fit.room)}</p>",
        *_table(fit),
        *(f"<p>{html.escape(line)}</p>" for line in fit.verdict),
        f"<pre>{html.escape(fit.fastest.code)}</pre>" if fit.fastest and fit.fastest.code else "",
        "<h2>Bytes and time</h2>",
        "<p class='faint'>Of a step by each choice, by its number in the table; the line is what"
        " plans can do.</p>",
        *_front(fit),
        steps(fit.timelines, fit.usable),
        "</html>",
    ]
    write_text(path, "\n".join(parts) + "\n")


def steps(timelines: Mapping[str, Timeline], usable: int | None, of: str = "") -> str:
    """Memory over steps by their names, and what a device has for tensors; `of` says which steps,
    or why there are none.

    A part of a page.
    """
    heading = "<h2>Memory over a step</h2>" + (f"<p class='faint'>{html.escape(of)}</p>" * bool(of))
    if not timelines:
        return heading
    parts = [
        f"<style>{_DRAWN}</style>",
        heading,
        f"<p class='key'>{''.join(map(_key, _BANDS))}</p>",
        "<p class='faint'>Numbers below are blocks, forward and then backward. Point at a place, or"
        " touch it, or go there by the arrow keys, to read which layer it is and what is allocated"
        " there.</p>",
    ]
    for name, timeline in timelines.items():
        parts += _over_time(name, timeline, usable)
    parts.append(f"<script id='steps'>{{{_SCRIPT}}}</script>")
    return "\n".join(parts)


def _table(fit: Fit) -> Iterator[str]:
    words = {"batch": "largest batch", "sequence": "longest sequence"}
    sizes = {words[name]: found for name, found in fit.sizes.items()}
    yield "<div class='wide'><table><tr>"
    columns = ("choice", "peak", "", "margin", "ms", *sizes)
    yield "".join(f"<th>{column}</th>" for column in columns) + "</tr>"
    for number, row in enumerate(fit.rows, start=1):
        own = (found[number - 1] for found in sizes.values())
        cells = (human_bytes(row.peak), row.verdict, human_bytes(row.margin), f"{row.ms:.0f}", *own)
        yield f"<tr class='{'' if row.fits else 'no'}'><td>{number}. {html.escape(row.name)}</td>"
        yield "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


# ---- pictures ------------------------------------------------------------------------------------


def _figure(shapes: str, labels: Iterable[str], data: str = "") -> str:
    box = f"viewBox='0 0 {_ACROSS} {_UP}' preserveAspectRatio='none' aria-hidden='true'"
    return f"<figure class='drawn'{data}><svg {box}>{shapes}</svg>{''.join(labels)}</figure>"


def _label(kind: str, text: str, left: float | None = None, up: float | None = None) -> str:
    """Text at shares of the width and the height."""
    place = "" if left is None else f"left:{100 * left:.2f}%;"
    place += "" if up is None else f"bottom:{100 * up:.2f}%"
    return f"<span class='{kind}' style='{place}'>{html.escape(text)}</span>"


def _line(points: Iterable[tuple[float, float]], colour: str, dashes: str = "") -> str:
    path = "L".join(f"{_ACROSS * x:.1f} {_UP * (1 - y):.2f}" for x, y in points)
    style = f"stroke:var(--{colour});stroke-width:1.5;fill:none;stroke-dasharray:{dashes or 'none'}"
    return f"<path d='M{path}' style='{style}' vector-effect='non-scaling-stroke'/>"


def _ticks(top: float, about: int = 4) -> list[float]:
    """Round numbers from 0 up to `top`."""
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw)
    return [n * step for n in range(int(top / step) + 1)]


def _heights(top: float) -> list[str]:
    return [_label("y", f"{gib:g} GiB", up=gib * _GIB / top) for gib in _ticks(top / _GIB)]


def _limit(usable: int | None, top: float) -> tuple[str, list[str]]:
    """The line of what the device has, or words where it is above the picture."""
    if usable is None:
        return "", []
    text = f"the card has {human_bytes(usable)} for tensors"
    if usable > top:
        return "", [_label("limit", f"{text}, above this", up=1)]
    up = usable / top
    return _line([(0, up), (1, up)], "limit", "6 4"), [_label("limit", text, up=up)]


def _front(fit: Fit) -> Iterator[str]:
    slowest = 1.08 * max([*(row.ms for row in fit.rows), *(ms for ms, _ in fit.front)])
    top = 1.1 * max(row.peak for row in fit.rows)
    line, labels = _limit(fit.usable, top)
    labels += _heights(top)
    labels += [_label("x", f"{ms:g} ms", ms / slowest) for ms in _ticks(slowest)[1:]]
    for numbers, row in _apart(fit.rows, slowest, top):
        labels.append(_label("dot", numbers, row.ms / slowest, row.peak / top))
    steps = [(ms / slowest, peak / top) for ms, peak in fit.front]
    yield _figure(line + _line(steps, "front"), labels) + "<br>"


def _apart(rows: Iterable[Row], slowest: float, top: float) -> list[tuple[str, Row]]:
    """Rows with their numbers; those that would lie on each other share a place."""
    found: list[tuple[str, Row]] = []
    for number, row in enumerate(rows, start=1):
        for place, (numbers, other) in enumerate(found):
            near_x = abs(row.ms - other.ms) < 0.03 * slowest
            if near_x and abs(row.peak - other.peak) < 0.08 * top:
                found[place] = (f"{numbers},{number}", other)
                break
        else:
            found.append((str(number), row))
    return found


class _Bar(NamedTuple):
    """What runs until a share of the step, or the highest of that in a pixel."""

    end: float
    segment: Segment


_BANDS = {
    "weights": "weights",
    "optimizer": "optimiser",
    "other": "batch and cuBLAS",
    "kept": "kept for the backward pass, and gradients",
    "working": "working set",
}


def _key(band: str) -> str:
    return f"<i style='background:var(--{band})'></i>{_BANDS[band]}"


def _over_time(name: str, timeline: Timeline, usable: int | None) -> Iterator[str]:
    top = 1.15 * timeline.peak
    bars = list(_bars(timeline))
    static = timeline.parts
    floor = 0
    shapes = ""
    for band, size in (
        ("weights", static.parameters + static.buffers),
        ("optimizer", static.optimizer),
        ("other", static.inputs + static.workspace),
    ):
        shapes += _area([(0, 1, floor, floor + size)], band, top)
        floor += size
    starts = [0.0, *(bar.end for bar in bars)]
    spans = list(zip(starts, bars, strict=False))
    for band in ("working", "kept"):
        heights = [s.peak if band == "working" else min(s.before, s.peak) for _, s in bars]
        steps = [
            (start, bar.end, floor, floor + height)
            for (start, bar), height in zip(spans, heights, strict=True)
        ]
        shapes += _area(steps, band, top)
    line, labels = _limit(usable, top)
    labels += [*_heights(top), *_blocks(spans), "<span class='cursor'></span>"]
    highest = timeline.highest
    start = next(start for start, bar in spans if bar.segment.peak == highest.peak)
    labels.append(_label("peak", "peak", start, timeline.peak / top))
    parts = ", ".join(f"{part} {human_bytes(size)}" for part, size in peak_parts(timeline).items())
    yield f"<h3>{html.escape(name)}</h3>"
    yield (
        f"<p>{human_bytes(timeline.peak)} at most, in the"
        f" {html.escape(where(highest.phase, highest.place))} ({highest.operator}): {parts}."
        f" {timeline.ms:.0f} ms.</p>"
    )
    data = json.dumps(_readings(bars, floor), separators=(",", ":"))
    said = f"Memory over the step: {name}. The arrow keys read places."
    focus = f" tabindex='0' role='group' aria-label='{html.escape(said)}'"
    yield _figure(shapes + line, labels, f"{focus} data-bars='{html.escape(data)}'")
    yield "<p class='read faint' aria-live='polite'></p>"


def _area(steps: Iterable[tuple[float, float, int, int]], band: str, top: float) -> str:
    """Steps from where to where, and between which bytes."""
    path = "".join(
        f"M{_ACROSS * a:.1f} {_UP * (1 - low / top):.2f}V{_UP * (1 - high / top):.2f}"
        f"H{_ACROSS * b:.1f}V{_UP * (1 - low / top):.2f}z"
        for a, b, low, high in steps
        if high > low and b > a
    )
    return f"<path d='{path}' style='fill:var(--{band})' shape-rendering='crispEdges'/>"


def _bars(timeline: Timeline) -> Iterator[_Bar]:
    """Segments by when they end, of those in one pixel that with the highest peak."""
    total = max(timeline.ms, 1e-9)
    begin = end = 0.0
    highest: Segment | None = None
    for segment, ms in timeline.timed():
        changed = highest is not None and segment.phase != highest.phase
        if highest is not None and (end - begin >= 1 / _ACROSS or changed):
            yield _Bar(end, highest)
            begin, highest = end, None
        end = ms / total
        if highest is None or segment.peak > highest.peak:
            highest = segment
    if highest is not None:
        yield _Bar(1.0, highest)


def _readings(bars: list[_Bar], static: int) -> dict[str, object]:
    """What the page says of each bar: places by their numbers, and the bytes by what they are."""
    names: dict[str, int] = {}
    found = []
    for _, segment in bars:
        place = f"{where(segment.phase, segment.place)}, {segment.operator}"
        before = min(segment.before, segment.peak)
        sizes = (round(size / 2**20, 2) for size in (before, segment.peak - before))
        found.append((names.setdefault(place, len(names)), *sizes))
    return {
        "floor": round(static / 2**20, 2),
        "ends": [round(1000 * bar.end, 1) for bar in bars],
        "bars": found,
        "names": list(names),
    }


def _blocks(spans: Iterable[tuple[float, _Bar]]) -> Iterator[str]:
    """Numbers of blocks below the places where they run, as far as there is room."""
    said = -1.0
    last = None
    for start, bar in spans:
        number = re.findall(r"\.(\d+)(?=\.|$)", f".{bar.segment.place}")
        at = (bar.segment.phase, number[0] if number else None)
        if at == last:
            continue
        last = at
        if bar.segment.phase in (FORWARD, BACKWARD) and number and start - said >= 0.06:
            yield _label("x", number[0], start)
            said = start
        if bar.segment.phase == STEP and start - said >= 0.06:
            yield _label("x", "step", min(start, 0.97))
            said = start
