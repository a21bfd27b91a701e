"""Every objective by name: what is predicted, and from which tokens. `pipeline.models.mr_mae` has them as a table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.errors import ConfigError, suggest

MimicFrom = Literal["encoder", "decoder", "map", ""]
_TARGET_ROWS = {"encoder": "visible", "decoder": "masked", "map": "visible", "": "none"}


@dataclass(frozen=True)
class Objective:
    """What is predicted, and from where. A new one is an entry of `OBJECTIVES`.

    Attributes:
        pixels: whether a decoder reconstructs the pixels of masked cells.
        mimics: the tokens that are compared with the teacher's: "encoder" (of the visible cells, after the blocks that
            `mimic.fusion` names), "decoder" (of the masked cells), "map" (all cells of a whole view), "" for none.
        loss: makes the module that compares them, once for each teacher: `loss(dim=..., width=...)` with the channels
            of the student's tokens and of the teacher's. None for the losses of `pipeline.models.mimic`.
            `module(tokens, targets)` takes a sequence of S student tokens [B, N, dim] (S blocks, the last one last) and
            the teacher's raw tokens [B, N, width], or clusters int64 [B, N] with `mimic.target` "codes". It returns the
            loss of each sample [B].

    Raises:
        ConfigError: `mimics` is none of these words, or there is a loss and nothing to compare.
    """

    pixels: bool
    mimics: MimicFrom
    loss: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.mimics not in get_args(MimicFrom):
            raise ConfigError(f"Objective(mimics={self.mimics!r}): use one of {get_args(MimicFrom)}")
        if self.loss is not None and not self.mimics:
            raise ConfigError("Objective(loss=...): say which tokens it compares: mimics='encoder', 'decoder' or 'map'")

    @property
    def target_rows(self) -> str:
        """Which cells' teacher tokens are wanted: "visible", "masked", "none"."""
        return _TARGET_ROWS[self.mimics]

    @property
    def masks(self) -> bool:
        """Whether the encoder sees some cells alone. If not, all are visible."""
        return self.mimics != "map"

    @property
    def decodes(self) -> bool:
        """Whether anything is predicted from a decoder's tokens."""
        return self.pixels or self.mimics == "decoder"


OBJECTIVES: dict[str, Objective] = {
    "mr_mae": Objective(pixels=True, mimics="encoder"),
    "mae": Objective(pixels=True, mimics=""),
    "feature_encoder": Objective(pixels=False, mimics="encoder"),
    "feature_decoder": Objective(pixels=False, mimics="decoder"),
    "joint_decoder": Objective(pixels=True, mimics="decoder"),
    "distil": Objective(pixels=False, mimics="map"),
}


def check_objective(name: str) -> str:
    """The name, if it is registered.

    Raises:
        ValueError: it isn't; the message lists those that are.
    """
    if name not in OBJECTIVES:
        near = suggest(name, OBJECTIVES, "load the file that registers it by --plugin FILE.py")
        raise ValueError(f"objective={name!r} is unknown: {near} (there are {', '.join(OBJECTIVES)})")
    return name
