"""The one style of all figures: colours, line ends with labels instead of a legend, sizes, files.

A figure is 6 inches wide and its smallest text has 9 points, so it can be read in print and on a
phone. The project's lines are strong, each in its own colour, and peers are grey; no colour is
used twice. `draw_curves`, `draw_intervals` and `draw_bars` return a matplotlib figure; `save`
writes it.
"""

import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

WIDTH = 6.0  # inches
SMALL = 9  # points, the smallest text
OWN = "#0a5fc4"  # the project's first line
# The project's lines: after Okabe and Ito, 2008. Any two of them differ for the colour-blind, too.
MOST_SHARED = 4  # lines with bands on the same axes; more get a panel each
COLOURS = (OWN, "#c44e00", "#1b9e77", "#c264a0", "#e6a000", "#5bb8ec", "#111111")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # for prints in black and white
PEER = "#a0a0a0"  # one line behind the others
TEXT = "#505050"
GOAL = {"color": TEXT, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
STYLE = {
    "figure.dpi": 200,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "figure.titlesize": 11,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "svg.hashsalt": "cleanq",  # the same figure is the same file
}


class Curve(NamedTuple):
    """One line of a figure. x, middle, low, high: (T,) arrays.

    `low` and `high` bound the band around the line. `seeds`: [(x, y)], thin lines behind it.
    `tail`: (x, y), its thin end, where fewer runs are left. A peer is grey. `text` stands in the
    label, after the name. `style` is instead of the one from its place among the curves.
    """

    label: str
    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    seeds: tuple = ()
    tail: tuple | None = None
    peer: bool = False
    text: str = ""
    style: dict | None = None


def align(series, most=200):
    """Runs on a common grid. `series`: [(x, y)], x ascending.

    The grid, (T,), begins where all runs have begun. It has the x of all runs, or, if they are more
    than `most`, as many equal steps and the ends of the runs. Returns it and the values there,
    (runs, T), linear between a run's own points and NaN after its last one. A run that ends in the
    last fiftieth of the longest one, as with its last episode, keeps its last value to the end.
    """
    start = max(x[0] for x, _ in series)
    grid = np.unique(np.concatenate([x for x, _ in series]))
    grid = grid[grid >= start]
    if len(grid) > most:
        ends = [x[-1] for x, _ in series if x[-1] >= start]
        grid = np.union1d(np.linspace(start, grid[-1], most), ends)
    whole = [reaches(x[-1], grid[-1]) for x, _ in series]
    rights = [y[-1] if there else np.nan for (_, y), there in zip(series, whole)]
    return grid, np.array([np.interp(grid, *xy, right=right) for xy, right in zip(series, rights)])


def reaches(end, last):
    """Whether a run that ends there counts as one of the whole length."""
    return end >= 0.98 * last


def curve_of_runs(label, series, middle_of, interval_of, **options):
    """The Curve of some runs, [(x, y)], of equal or unequal length.

    `middle_of`: (runs, T) -> (T,). `interval_of`: (runs, T) -> low, high, both (T,). The line and
    its band end with the first run that ends. From there on the middle of the remaining runs is the
    tail.
    """
    x, values = align(series)
    whole = np.count_nonzero(~np.isnan(values).any(axis=0))  # the first points
    middle = middle_of(values[:, :whole])
    low, high = interval_of(values[:, :whole]) if len(series) > 1 and whole else (None, None)
    tail = None
    if whole < len(x):
        rest = [middle_of(column[~np.isnan(column), None])[0] for column in values[:, whole:].T]
        tail = x[max(whole - 1, 0) :], np.array([*middle[-1:], *rest])
    return Curve(label, x[:whole], middle, low, high, tail=tail, **options)


def pyplot():
    """matplotlib.pyplot in this style; it draws into files only. Exits if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: figures need matplotlib; run `pip install '.[plot]'` first.")
    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams.update(STYLE)
    return matplotlib.pyplot


def styles(peers):
    """The line style of each line, and no two alike. `peers`: for each, whether it is a peer's.

    The project's lines have a colour and a marker each; more than seven of them share one, because
    they have a panel or a row each. Peers are shades of grey, from dark to light, dashed in turn.
    """
    many = peers.count(False) > len(COLOURS)
    own = iter([*zip(COLOURS, MARKERS)] if not many else [(OWN, "o")] * len(peers))
    greys = iter(np.linspace(0.4, 0.75, max(peers.count(True), 2)))
    dashes = iter(["-", "--", "-.", ":"] * len(peers))
    found = []
    for peer in peers:
        if peer:
            style = {"color": (next(greys),) * 3, "linestyle": next(dashes), "linewidth": 1.2}
        else:
            colour, marker = next(own)
            style = {"color": colour, "marker": marker, "markeredgecolor": "white", "zorder": 3}
        found.append(style)
    return found


def new_figure(title, note, height=3.9, **options):
    """(figure, axes) with a bold title, and a note below it in small letters."""
    figure, axes = pyplot().subplots(figsize=(WIDTH, height), layout="constrained", **options)
    title, note, point = textwrap.fill(title, 60), textwrap.fill(note, 90), 1 / 72 / height
    place = {"x": 0.01, "ha": "left", "va": "top"}
    figure.suptitle(title, y=1 - 5 * point, fontweight="bold", **place)
    below = 22 + 14 * title.count("\n")
    figure.text(y=1 - below * point, s=note, fontsize=SMALL, color=TEXT, **place)
    lines = note.count("\n") + 1 if note else 0
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - (below + 2 + 12 * lines) * point))
    return figure, axes


def draw_curves(
    curves,
    title,
    note,
    xlabel,
    ylabel,
    goal=None,
    at_ends=True,
    log=False,
    height=3.9,
    width=18,
    xlim=None,
    ylim=None,
    yformat=None,
):
    """Curves with their bands, each named at its end. Many of them have a panel each.

    `goal`: (y, text), a dashed line. `log`: logarithmic axes, with a tick at each x. `height` of
    the figure in inches, `width` of a label in characters; `yformat` like "{x:.0%}". Without
    `at_ends` the labels stand beside the axes in the order of the curves, with their markers: for
    lines that all end at the same height.
    """
    banded = sum(curve.low is not None and not curve.peer for curve in curves)
    if banded > MOST_SHARED or [curve.peer for curve in curves].count(False) > len(COLOURS):
        return draw_panels(curves, title, note, xlabel, ylabel, goal, xlim, yformat)
    figure, axes = new_figure(title, note, height)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    labels = [] if goal is None else [(*goal, {"color": TEXT})]
    for curve, style in zip(curves, styles([curve.peer for curve in curves])):
        style = {**(curve.style or style)}
        draw_curve(axes, curve, style)
        labels.append((end_of(curve)[1], f"{curve.label} {curve.text}".strip(), style))
    finish_axes(axes, curves, goal, log)
    axes.set(**{k: v for k, v in (("xlim", xlim), ("ylim", ylim)) if v})
    if yformat:
        axes.yaxis.set_major_formatter(yformat)
    if at_ends:
        for curve, (_, _, style) in zip(curves, labels[-len(curves) :]):  # a line to its label
            (x, y), right = end_of(curve), axes.get_xlim()[1]
            if x < right:
                axes.plot([x, right], [y, y], color=style["color"], linewidth=0.7, linestyle=":")
        label_ends(axes, labels, width)
    else:
        label_beside(axes, [label[1:] for label in labels], width)
    return figure


def end_of(curve):
    """(x, y) of a curve's last point."""
    x, y = curve.tail or (curve.x, curve.middle)
    return x[-1], y[-1]


def draw_curve(axes, curve, style):
    style = style | {"markevery": max(len(curve.x) // 8, 1), "clip_on": False}
    if len(curve.x) == 1:  # a line through one point is invisible
        style |= {"marker": "o"}
    colour, zorder = style["color"], style.get("zorder", 2)
    for x, y in curve.seeds:
        axes.plot(x, y, color=colour, alpha=0.35, linewidth=0.8, zorder=zorder - 0.5)
    if curve.low is not None:
        shade = {"color": colour, "alpha": 0.15, "linewidth": 0, "zorder": zorder - 1}
        axes.fill_between(curve.x, curve.low, curve.high, **shade)
    axes.plot(curve.x, curve.middle, label=curve.label, **style)
    if curve.tail:
        axes.plot(*curve.tail, color=colour, linewidth=0.9, zorder=zorder)


def finish_axes(axes, curves, goal, log=False):
    """Limits and tick labels of the axes, and the goal."""
    last = max(x[-1] for curve in curves for x in (end_of(curve)[:1], *(x for x, _ in curve.seeds)))
    starts = [curve.x[0] for curve in curves if len(curve.x)]
    axes.set_xlim(min(starts) if log else min([0, *starts]), last)
    if log:
        x = np.unique(np.concatenate([curve.x for curve in curves]))
        axes.set(xscale="log", yscale="log", xticks=x)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        subs = (1, 2, 5) if high / low < 100 else (1,)
        axes.yaxis.set_major_locator(pyplot().LogLocator(subs=subs))
        axes.yaxis.set_major_formatter("{x:,g}")
    else:
        axes.xaxis.set_major_locator(pyplot().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda y, _: thousands(y))
    axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
    if goal is not None:
        axes.axhline(goal[0], **GOAL)


def draw_panels(curves, title, note, xlabel, ylabel, goal, xlim=None, yformat=None):
    """A panel for each curve, with the first one in grey behind the others."""
    first, columns = curves[0], 3
    rows = -(-len(curves) // columns)
    note = "; ".join(filter(None, (note, f"grey: {first.label}", goal and f"dashed: {goal[1]}")))
    options = {"nrows": rows, "ncols": columns, "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = new_figure(title, note, 1.1 + 1.4 * rows, **options)
    figure.get_layout_engine().set(w_pad=0.08)
    figure.supxlabel(xlabel, fontsize=STYLE["axes.labelsize"])
    figure.supylabel(ylabel, fontsize=STYLE["axes.labelsize"])
    for ax, curve in zip(axes.flat, curves):
        if curve is not first:
            ax.plot(first.x, first.middle, color=PEER, linewidth=1.2)
        colour = TEXT if curve.peer else OWN
        draw_curve(ax, curve._replace(seeds=()), {"color": colour, "zorder": 3})
        ax.set_title(textwrap.fill(curve.label, 24), fontsize=SMALL, pad=3)
        finish_axes(ax, curves, goal)
        ax.xaxis.set_major_locator(pyplot().MaxNLocator(2, steps=[1, 2, 2.5, 5, 10]))
        if xlim:
            ax.set_xlim(xlim)
        if yformat:
            ax.yaxis.set_major_formatter(yformat)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    for ax in axes[-2][len(curves) - columns * (rows - 1) :] if rows > 1 else ():
        ax.tick_params(labelbottom=True)  # nothing is below it
    return figure


def draw_intervals(rows, title, note, xlabel, reference=None, xlim=None):
    """A dot with its interval for each row, the first on top, named on the left.

    `rows`: [(name, middle, low, high, line style)]; low and high are None if there is no interval.
    `reference`: a dashed line at this x. `xlim`: (low, high), each may be None.
    """
    figure, axes = new_figure(title, note, height=1.4 + 0.36 * len(rows))
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    for at, (_, middle, low, high, style) in enumerate(rows):
        if low is not None:
            line = {"color": style["color"], "linewidth": 6, "alpha": 0.35}
            axes.plot([low, high], [at, at], solid_capstyle="butt", **line)
        marker = {"marker": "o", **style, "linestyle": "", "markersize": 7}
        axes.plot(middle, at, **marker)
        number = f"{middle:,.0f}" if abs(middle) >= 1000 else f"{middle:.3g}"
        options = {"va": "center", "fontsize": SMALL, "color": TEXT}
        place = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(number, (high if low is not None else middle, at), **place, **options)
    if reference is not None:
        axes.axvline(reference, **GOAL)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 28) for name, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlim(xlim)
    axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
    return figure


def draw_bars(rows, title, note, xlabel, reference=None):
    """A bar for each row, the first on top, with its name on the left and its length at its end.

    `rows`: [(name, length, peer)]. `reference`: (x, text), a dashed line with a label below.
    """
    figure, axes = new_figure(title, note, height=1.4 + 0.22 * len(rows))
    axes.set_xlabel(xlabel)
    axes.grid(visible=False)
    for at, (_, length, peer) in enumerate(rows):
        axes.barh(at, length, color=PEER if peer else OWN, height=0.75)
        place = {"xytext": (3, 0), "textcoords": "offset points"}
        axes.annotate(f"{length:,.0f}", (length, at), va="center", fontsize=SMALL, **place)
    if reference is not None:
        axes.axvline(reference[0], **GOAL | {"zorder": 3})
        axes.annotate(
            reference[1],
            (reference[0], len(rows) - 0.4),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=SMALL,
            color=TEXT,
        )
        axes.set_ylim(len(rows) + 0.4, -0.6)
    else:
        axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
    return figure


def label_ends(axes, labels, width=18):
    """Write labels to the right of the axes, each at the height of its line's end.

    `labels`: [(y in data units, text, line style)]. Labels that would overlap move apart, but stay
    beside the axes where they fit, and a thin line leads from each to its height. Call it after
    the limits and scale of the axes are set. Texts are broken at `width` characters.
    """
    figure = axes.figure
    labels = [(y, wrap(text, width), style["color"]) for y, text, style in labels]
    labels.sort(key=lambda label: label[0])
    figure.canvas.draw()  # lays the axes out
    height = axes.get_window_extent().height
    line = 1.35 * SMALL * figure.dpi / 72 / height  # one line of text, in axes units
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    left = axes.get_xlim()[1]
    heights = [to_axes((left, y))[1] for y, _, _ in labels]
    sizes = [line * (text.count("\n") + 1) for _, text, _ in labels]
    for at, middle, (_, text, colour) in zip(heights, spread(heights, sizes, 0, 1), labels):
        axes.annotate(
            text,
            xy=(1.0, at),
            xytext=(1.07, middle),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=dark(colour),
            fontsize=SMALL,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )


def label_beside(axes, labels, width=18):
    """Write labels to the right of the axes from the top down, each beside a piece of its line.

    `labels`: [(text, line style)].
    """
    line = 1.35 * SMALL / 72 / (axes.figure.get_size_inches()[1] * 0.7)  # in axes units, about
    top = 1.0
    for text, style in labels:
        text = wrap(text, width)
        middle = top - line / 2
        options = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1.03, 1.06, 1.09], [middle] * 3, **style, markevery=[1], **options)
        axes.text(
            1.11,
            top,
            text,
            color=dark(style["color"]),
            fontsize=SMALL,
            va="top",
            transform=axes.transAxes,
        )
        top -= line * (text.count("\n") + 1.6)


def spread(heights, sizes, low=-np.inf, high=np.inf):
    """Move labels as little as possible so that they do not overlap.

    `heights`: their wanted middles, ascending; `sizes`: their heights. They stay between `low` and
    `high` if they fit, and else begin at `low`. The squares of the shifts have the least sum.
    """
    from scipy.optimize import isotonic_regression

    offsets = np.cumsum(sizes) - np.asarray(sizes) / 2
    bottoms = isotonic_regression(np.asarray(heights) - offsets).x  # equal where labels touch
    return np.clip(bottoms, low, max(high - sum(sizes), low)) + offsets


def dark(colour):
    """The colour, darkened if it is too light for text on white."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    light = rgb @ (0.299, 0.587, 0.114)
    return tuple(rgb * min(1.0, 0.5 / max(light, 1e-9)))


def wrap(text, width):
    """The text in lines of at most `width` characters, also broken after `_`."""
    words = re.sub(r"_(?=\S)", "_\0", text)  # a place where a line may end
    lines = [""]
    for word in re.split(r"( |\0)", words):
        if len(lines[-1] + word) > width and word not in (" ", "\0"):
            lines.append("")
        lines[-1] += word.replace("\0", "")
    return "\n".join(line.strip() for line in lines if line.strip())


def short_names(names):
    """{name: shown name}: scripts without `_cartpole` or `_atari`, where they stay apart."""
    short = [re.sub("_(cartpole|acrobot|atari)$", "", name) for name in names]
    return dict(zip(names, short if len({*short}) == len({*names}) else names))


def thousands(x):
    """1500 -> "1.5k", 2000000 -> "2M", 1024 -> "1,024" """
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if abs(x) >= size:
            text = f"{x / size:g}{letter}"
            return text if len(text) < 6 else f"{x:,.0f}"
    return f"{x:g}"


def save(figure, path):
    """Write the figure as `path`.png and `path`.svg. The same figure gives the same files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.parent / f"{path.name}.png")
    figure.savefig(path.parent / f"{path.name}.svg", metadata={"Date": None})
    pyplot().close(figure)
