"""Pictures that matplotlib draws, written whole: a full disk doesn't cost the former one."""

from pathlib import Path

from matplotlib.figure import Figure

from pipeline.errors import ConfigError
from pipeline.files import remove_dead_partials, whole_file


def save_figure(figure: Figure, path: Path, dpi: int) -> Path:
    """Write the figure as the file that `path` names by its ending, png where it has none; returns `path`.

    Raises:
        ConfigError: matplotlib knows no such format.
        OSError: disk full, read-only, ...; a former picture stays as it is.
    """
    kind = path.suffix.removeprefix(".").lower() or "png"
    formats = figure.canvas.get_supported_filetypes()
    if kind not in formats:
        raise ConfigError(f"{path}: no picture can be written as .{kind}: choose one of {', '.join(sorted(formats))}")
    remove_dead_partials(path)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=kind)
    return path
