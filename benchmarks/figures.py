"""Shared parts of the records' figures: colours, and labels at the ends of lines."""

OWN = "#0a5fc4"  # the project's lines
PEER = "#a8a8a8"  # the peers' lines
TEXT = "#555555"
# For several lines in one figure: Okabe and Ito, 2008, told apart by the colour-blind.
COLOURS = (OWN, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def pyplot():
    """matplotlib.pyplot, which draws into files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def label_ends(axes, labels, fontsize=9):
    """Write labels to the right of the axes, each at the height of its line's end.

    `labels`: [(y in data units, text, colour)]. Labels that would overlap move apart, and a thin
    line leads from each to its height. Call it after the limits and scale of the axes are set.
    """
    figure = axes.figure
    height = axes.get_window_extent().height
    line = 1.35 * fontsize * figure.dpi / 72 / height  # one line of text, in axes units
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    left = axes.get_xlim()[1]
    labels = sorted(labels, key=lambda label: label[0])
    heights = [to_axes((left, y))[1] for y, _, _ in labels]
    sizes = [line * (text.count("\n") + 1) for _, text, _ in labels]
    for at, middle, (_, text, colour) in zip(heights, spread(heights, sizes), labels):
        axes.annotate(
            text,
            xy=(1.0, at),
            xytext=(1.05, middle),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=fontsize,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )


def spread(heights, sizes):
    """Move labels as little as possible so that they do not overlap.

    `heights`: their wanted middles, ascending; `sizes`: their heights. Labels that touch form a
    block, whose middle is the mean of the wanted middles of its labels.
    """
    blocks = []  # [labels' indices, middle, size]
    for i, (height, size) in enumerate(zip(heights, sizes)):
        blocks.append([[i], height, size])
        while len(blocks) > 1:
            (low, low_middle, low_size), (high, high_middle, high_size) = blocks[-2:]
            if high_middle - low_middle >= (low_size + high_size) / 2:
                break
            size = low_size + high_size
            wanted, offset = 0.0, 0.0  # of the block's bottom, from each of its labels
            for j in low + high:
                wanted += heights[j] - offset - sizes[j] / 2
                offset += sizes[j]
            bottom = wanted / len(low + high)
            blocks[-2:] = [[low + high, bottom + size / 2, size]]
    middles = []
    for indices, middle, size in blocks:
        bottom = middle - size / 2
        for i in indices:
            middles.append(bottom + sizes[i] / 2)
            bottom += sizes[i]
    return middles
