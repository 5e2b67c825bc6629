"""Names beside the points of a front, by one rule, in time linear in their number. No torch.

Up and left of a point on a front no variant can lie, for it would be cheaper and more accurate. So
a name stands there, in the first row that is free; where the panel has no room, it is left out.
"""

from matplotlib.text import Text

FONT = 9.5  # points
GAP = 4  # points from a mark to its name
ROWS = 8  # heights of a line that a name may move up


def overlaps(a, b) -> bool:
    """Whether two boxes (left, bottom, right, top) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def label_points(panel, points, names, colors, marks, mark_size: float) -> None:
    """Write the names that find room beside their points. points: (x, y), from the lowest up.

    marks: (x, y) of everything drawn in the panel, mark_size points wide. Axes must be final.
    """
    pixels = panel.figure.dpi / 72
    left, _, right, top = panel.get_window_extent().extents
    half = mark_size / 2 * pixels
    taken = [
        (x - half, y - half, x + half, y + half)
        for x, y in (panel.transData.transform(mark) for mark in marks)
    ]
    offset = {"textcoords": "offset points"}
    for point, name, color in zip(points, names, colors, strict=True):
        look = {"fontsize": FONT, "color": color, "parse_math": False, "zorder": 6}
        text = Text(text=name, figure=panel.figure, **look)
        width, height = text.get_window_extent().size
        x, y = panel.transData.transform(point)
        start = min(max(x - GAP * pixels - width, left + 3), right - width - 3)
        for row in range(ROWS):
            bottom = y + (GAP * pixels / 2) + row * height
            box = (start, bottom, start + width, bottom + height)
            if box[3] < top and not any(overlaps(box, other) for other in taken):
                break
        else:
            continue
        taken.append(box)
        corner = (box[0] - x) / pixels, (box[1] - y) / pixels
        panel.annotate(name, point, corner, va="bottom", **offset, **look)
        if row > 0:
            end = (min(box[2], x) - x) / pixels, (box[1] - y) / pixels
            line = {"arrowstyle": "-", "lw": 0.6, "color": color, "shrinkA": 0, "shrinkB": 3}
            panel.annotate("", point, end, arrowprops=line, zorder=5, **offset)
