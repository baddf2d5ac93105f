"""An ECG as it comes out of the recorder: 25 mm/s, 10 mm/mV, three rows of four leads over a rhythm strip."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from modeling_ecgmoe.adapters import Explanation
from modeling_ecgmoe.leads import LEADS

MM_PER_S = 25.0
MM_PER_MV = 10.0
ROWS = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
COLUMN_S = 2.5
PAGE_S = len(ROWS[0]) * COLUMN_S

LEFT_MM, RIGHT_MM, ROW_MM, TOP_MM, BOTTOM_MM = 15.0, 5.0, 30.0, 15.0, 10.0
WIDTH_MM = LEFT_MM + PAGE_S * MM_PER_S + RIGHT_MM
HEIGHT_MM = TOP_MM + (len(ROWS) + 1) * ROW_MM + BOTTOM_MM
MM_PER_INCH = 25.4
DPI = 170

PAPER, FINE_GRID, GRID, INK, GREY = "#fffaf7", "#f8dcd4", "#eeb1a2", "#1b1b1f", "#77706c"
# Distinguishable with any colour vision (Okabe and Ito 2008).
EXPERT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
QRS_S = (-0.05, 0.06)  # how much of a beat is drawn in the colour of its expert


def colour_of(expert: int) -> str:
    """The colour of an expert, the same everywhere on the page."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def draw_sheet(
    signal: np.ndarray,
    sampling_rate: float,
    recorded: Sequence[str],
    r_peaks_s: Sequence[float],
    experts: Sequence[int],
    title: str,
) -> Image.Image:
    """Draw the first ten seconds of a recording.

    Args:
        signal: float array (12, samples) in mV in the order of `LEADS`, NaN where missing.
        sampling_rate: in Hz.
        recorded: the leads that were recorded; the others are derived, or missing where they are NaN.
        r_peaks_s: R peaks in seconds.
        experts: the expert that weighs most on each of these beats.
        title: one line over the sheet.
    """
    figure = Figure(figsize=(WIDTH_MM / MM_PER_INCH, HEIGHT_MM / MM_PER_INCH), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH_MM)
    axes.set_ylim(0, HEIGHT_MM)
    axes.axis("off")
    _draw_paper(axes)
    beats = [(peak, expert) for peak, expert in zip(r_peaks_s, experts, strict=True) if peak < PAGE_S]
    duration_s = signal.shape[1] / sampling_rate
    for row, names in enumerate(ROWS):
        base_mm = HEIGHT_MM - TOP_MM - (row + 0.5) * ROW_MM
        _draw_calibration(axes, base_mm)
        for column, name in enumerate(names):
            # A short recording fills the columns on the right with its end.
            start_s = min(column * COLUMN_S, max(0.0, duration_s - COLUMN_S))
            left_mm = LEFT_MM + column * COLUMN_S * MM_PER_S
            lead = signal[LEADS.index(name)]
            _draw_lead(axes, lead, sampling_rate, (start_s, COLUMN_S), (left_mm, base_mm), beats)
            _label(axes, name, left_mm, base_mm, name in recorded, bool(np.isfinite(lead).any()))
    base_mm = HEIGHT_MM - TOP_MM - (len(ROWS) + 0.5) * ROW_MM
    strip = next(name for name in ("II", *LEADS) if np.isfinite(signal[LEADS.index(name)]).any())
    _draw_calibration(axes, base_mm)
    _draw_lead(axes, signal[LEADS.index(strip)], sampling_rate, (0.0, PAGE_S), (LEFT_MM, base_mm), beats)
    _label(axes, strip, LEFT_MM, base_mm, strip in recorded, True)
    for peak_s, expert in beats:
        x_mm = LEFT_MM + peak_s * MM_PER_S
        axes.text(x_mm, base_mm - 0.46 * ROW_MM, f"E{expert + 1}", color=colour_of(expert), fontsize=8, ha="center")
    axes.text(LEFT_MM, HEIGHT_MM - 7, title, fontsize=10, color=INK, weight="bold", parse_math=False)
    used = sorted({expert for _, expert in beats})
    legend = (
        "25 mm/s   10 mm/mV   E: the morphology expert that weighs most on the beat" if used else "25 mm/s   10 mm/mV"
    )
    axes.text(LEFT_MM, 4, legend, fontsize=8, color=GREY)
    axes.text(WIDTH_MM - RIGHT_MM, 4, "research tool, not a medical device", fontsize=8, color=GREY, ha="right")
    return _image(figure)


def _draw_paper(axes: Axes) -> None:
    for step_mm, colour, width in ((1.0, FINE_GRID, 0.4), (5.0, GRID, 0.6)):
        verticals = [[(x, 0), (x, HEIGHT_MM)] for x in np.arange(0, WIDTH_MM + 0.1, step_mm)]
        horizontals = [[(0, y), (WIDTH_MM, y)] for y in np.arange(0, HEIGHT_MM + 0.1, step_mm)]
        axes.add_collection(LineCollection(verticals + horizontals, colors=colour, linewidths=width, zorder=0))
    axes.figure.set_facecolor(PAPER)


def _draw_calibration(axes: Axes, base_mm: float) -> None:
    """The pulse of 1 mV and 0.2 s that every recorder writes."""
    left = LEFT_MM - 10
    axes.plot(
        [left, left + 2, left + 2, left + 7, left + 7, left + 9],
        [base_mm, base_mm, base_mm + MM_PER_MV, base_mm + MM_PER_MV, base_mm, base_mm],
        color=INK,
        linewidth=0.8,
    )


def _draw_lead(
    axes: Axes,
    lead: np.ndarray,
    sampling_rate: float,
    span_s: tuple[float, float],
    origin_mm: tuple[float, float],
    beats: Sequence[tuple[float, int]],
) -> None:
    """One lead from `span_s[0]` on for `span_s[1]` seconds, its base line at its median."""
    start_s, length_s = span_s
    time_s = np.arange(len(lead)) / sampling_rate
    inside = (time_s >= start_s) & (time_s <= start_s + length_s)
    if not np.isfinite(lead[inside]).any():
        return
    x_mm = origin_mm[0] + (time_s - start_s) * MM_PER_S
    y_mm = origin_mm[1] + (lead - np.nanmedian(lead[inside])) * MM_PER_MV
    axes.plot(x_mm[inside], y_mm[inside], color=INK, linewidth=0.8, solid_joinstyle="round")
    for peak_s, expert in beats:
        at_beat = inside & (time_s >= peak_s + QRS_S[0]) & (time_s <= peak_s + QRS_S[1])
        axes.plot(x_mm[at_beat], y_mm[at_beat], color=colour_of(expert), linewidth=1.4, solid_joinstyle="round")


def _label(axes: Axes, name: str, left_mm: float, base_mm: float, recorded: bool, present: bool) -> None:
    text = name if recorded else f"{name} (derived)" if present else f"{name} (not recorded)"
    axes.text(
        left_mm + 1,
        base_mm + 0.34 * ROW_MM,
        text,
        fontsize=9,
        color=INK if recorded else GREY,
        weight="bold",
        zorder=5,
    )
    axes.plot([left_mm, left_mm], [base_mm - 2.5, base_mm + 2.5], color=INK, linewidth=0.6)


def draw_experts(explanation: Explanation) -> Image.Image:
    """What the experts and the temporal families weigh in this recording, as shares of one."""
    figure = Figure(figsize=(WIDTH_MM / MM_PER_INCH, 2.3), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, sharey=True)
    families = explanation.family_weights
    beats, rhythm = (
        _shares(probabilities) for probabilities in (explanation.beat_experts, explanation.rhythm_experts)
    )
    _draw_bars(panels[0], "Morphology experts, mean over the beats", _numbered(len(beats)), beats)
    _draw_bars(panels[1], "Rhythm experts, mean over the recording", _numbered(len(rhythm)), rhythm)
    _draw_bars(panels[2], "Temporal families, mean gate", list(families), list(families.values()), GREY)
    panels[0].set_ylabel("weight")
    return _image(figure)


def _shares(probabilities: np.ndarray) -> list[float]:
    """The mean over elements of (elements, experts); zeros where there are no elements."""
    return list(probabilities.mean(axis=0)) if len(probabilities) else [0.0] * probabilities.shape[1]


def _numbered(count: int) -> list[str]:
    return [f"E{number}" for number in range(1, count + 1)]


def _draw_bars(
    axes: Axes, title: str, names: Sequence[str], weights: Sequence[float], colour: str | None = None
) -> None:
    colours = [colour or colour_of(index) for index in range(len(names))]
    axes.bar(names, weights, color=colours, width=0.7)
    axes.set_title(title, fontsize=9)
    axes.set_ylim(0, 1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for position, weight in enumerate(weights):
        axes.text(position, weight + 0.02, f"{weight:.2f}", ha="center", fontsize=8)


def _image(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
