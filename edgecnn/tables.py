"""Markdown tables of metrics.json."""


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, aligned so that it reads in a terminal too; the first column is text."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def render(cells):
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 1)}{'-' if i == 0 else ':'}" for i, w in enumerate(widths))
    return "\n".join([render(header), f"|{rule}|", *map(render, lines)])
