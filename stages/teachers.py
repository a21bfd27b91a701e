"""List the teachers by name.

Prints grid, width, input size, GMAC and bytes a view of each. timm:NAME and open_clip:ARCH:TAG name any other ViT.

Reads and writes nothing, and needs no weights. Costs a second.
"""

from pipeline.teachers import list_teachers


def run() -> str:
    """The table of the teachers, a line each."""
    lines = [f"{'name':<16}{'grid':>8}{'width':>7}{'pixels':>8}{'GMAC':>8}{'bytes a view':>14}  what"]
    for row in list_teachers():
        grid = f"{row.grid[0]}x{row.grid[1]}"
        figures = f"{grid:>8}{row.dim:>7}{row.image_size:>8}{row.gmacs:>8.1f}{row.bytes_per_view:>14}"
        lines.append(f"{row.name:<16}{figures}  {row.about}")
    return "\n".join(lines)
