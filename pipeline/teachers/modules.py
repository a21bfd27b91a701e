"""Any module as a teacher: a `ModuleEntry` says what the module doesn't, and `ModuleBackbone` runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError, TeacherError
from pipeline.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipeline.teachers.teacher import TeacherOutput, Trace, counted_macs


@dataclass(frozen=True)
class ModuleEntry:
    """A teacher of a user's own; an entry of `TEACHERS`, as `Entry` is.

    Attributes:
        build: `teacher.weights` (a path, "random" or None for the module's own) → a module. The module takes normalised
            pixels fp32 [B, 3, image_size, image_size] and returns a `TeacherOutput`: tokens [B, L, D], attention [B, L]
            of 0 or more or None, and `summary` [B, 1, D] or None. L is h·w of `grid`, in row-major order.
        version: of the code. It goes into each cache's fingerprint: change it whenever the outputs change.
        image_size: pixels a side; views of another size are resized to it.
        grid: (h, w) patches.
        mean, std: of the pixels in 0..1, a channel.
        about, licence: as in `Entry`.
    """

    build: Callable[[str | None], nn.Module]
    version: str
    image_size: int
    grid: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    about: str = ""
    licence: str = "not stated"


class ModuleBackbone(nn.Module):
    """A module behind the `Backbone` protocol: one block, which `tokens=norm` and `tokens=block` read alike.

    Raises:
        TeacherError: its output for a black image has other shapes than its entry says.
    """

    projected_dim: int | None = None
    depth = 1
    num_heads = 1
    native: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, name: str, entry: ModuleEntry, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.grid, self.image_size = entry.grid, entry.image_size
        self.mean, self.std = entry.mean, entry.std
        self.libraries: Mapping[str, str] = {class_name(model): entry.version}
        with torch.no_grad():
            output = self._run(self._black())
        shapes = [None if values is None else list(values.shape) for values in output]
        length, self.dim = entry.grid[0] * entry.grid[1], output.tokens.shape[-1]
        wanted = TeacherOutput([1, length, self.dim], [1, length], None, [1, 1, self.dim])  # type: ignore[arg-type]
        for part, shape, fitting in zip(TeacherOutput._fields, shapes, wanted, strict=True):
            if shape not in (None, fitting):
                raise TeacherError(f"teacher '{name}' gives {part} {shape} of one view, where its entry says {fitting}")
        self.has_attention, self.has_summary = output.attention is not None, output.summary is not None
        self.num_prefix = int(self.has_summary)

    def trace(self, x: Tensor, layers: int) -> Trace:
        """See `Backbone.trace`."""
        output = self._run(x)
        block = output.tokens if output.summary is None else torch.cat([output.summary, output.tokens], 1)
        rows = None if output.attention is None else F.pad(output.attention.float(), (self.num_prefix, 0)).unsqueeze(1)
        return Trace((block,), rows)

    def macs(self) -> int:
        """See `Backbone.macs`."""
        return counted_macs(self.model, self._black())

    def norm(self, tokens: Tensor) -> Tensor:
        """Nothing: the module's tokens are read as they are."""
        return tokens

    def project(self, tokens: Tensor) -> Tensor:
        """Never called: `projected_dim` is None."""
        return tokens

    def _run(self, pixels: Tensor) -> TeacherOutput:
        return TeacherOutput(*self.model(pixels))

    def _black(self) -> Tensor:
        device = next((tensor.device for tensor in self.model.state_dict().values()), None)
        return torch.zeros(1, 3, self.image_size, self.image_size, device=device)


def class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def build_module(
    name: str, entry: ModuleEntry, weights: str | None, image_size: int | None
) -> tuple[ModuleBackbone, str]:
    """Build a registered module; also return the name of its weights: the file's, "random" or `own/CLASS`.

    Raises:
        TeacherError: it can't be built or run, or an `image_size` is asked for that it doesn't have.
    """
    if image_size not in (None, entry.image_size):
        raise TeacherError(f"teacher '{name}' has image_size={entry.image_size}, not {image_size}: leave it out")
    try:
        model = entry.build(weights)
        backbone = ModuleBackbone(name, entry, model)
    except PipelineError:
        raise
    except Exception as error:
        reason = (str(error).strip().partition("\n")[0] or "no reason given")[:120]
        raise TeacherError(
            f"teacher '{name}' can't be run ({type(error).__name__}: {reason}): mend its plug-in (mrmae --debug shows "
            "the line)"
        ) from error
    return backbone, f"own/{class_name(model)}" if weights is None else Path(weights).name
