"""The teacher."""

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Config

TokenChoice = Literal["norm", "block", "projected"]


class TeacherConfig(Config):
    """Which teacher, and which of its tokens."""

    main_key: ClassVar[str] = "spec"

    spec: str = Field(min_length=1)  # see `mrmae teachers`: dino_vitb16, clip_vitb16, timm:NAME, mrmae:RUN, ...
    weights: str | None = None  # a local weights file, of any ending; "random" for tests; default: the hub
    image_size: int | None = Field(None, ge=8, le=4096)  # of the teacher's input, pixels; default: its own
    tokens: TokenChoice = "norm"  # after the last norm, before it (block), or projected as CLIP's image embedding is
    layer: int | None = Field(None, ge=1)  # the block that is read, counted from 1; null: the last one
    layers: int = Field(1, ge=1)  # mean of this many blocks, `layer` and those before it
    compile: bool = False  # torch.compile the forward: a minute at the start, faster after
