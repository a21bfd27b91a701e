"""List the teachers by name.

Prints grid, width, input size, GMAC and bytes a view of each, whether masks can be drawn by its attention, and the
licence of its weights. timm:NAME and open_clip:ARCH:TAG name any other ViT.

Reads and writes nothing, and needs no weights. Costs a few seconds.
"""

from pipeline.teachers import list_teachers


def run() -> str:
    """The table of the teachers, a line each."""
    titles = f"{'name':<20}{'grid':>7}{'width':>7}{'pixels':>8}{'GMAC':>8}{'bytes a view':>14}"
    lines = [f"{titles}  {'focus':<11}{'licence':<27}what"]
    for row in list_teachers():
        grid = f"{row.grid[0]}x{row.grid[1]}"
        figures = f"{grid:>7}{row.dim:>7}{row.image_size:>8}{row.gmacs:>8.1f}{row.bytes_per_view:>14}"
        focus = "attention" if row.has_attention else "random"
        lines.append(f"{row.name:<20}{figures}  {focus:<11}{row.licence:<27}{row.about}")
    return "\n".join(lines)
