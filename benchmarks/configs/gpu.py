"""The keys of `benchmark gpu`."""

from pydantic import Field

from pipeline.config import Config, PathField
from pipeline.configs.cache import StoreName
from pipeline.configs.models import StudentConfig
from pipeline.configs.teachers import TeacherConfig


class BenchmarkGpuConfig(Config):
    """What is measured. The defaults are meant for one H100 or H200; smaller sizes run anywhere, a CPU too."""

    minutes: float = Field(8, gt=0)
    patience: float = Field(3, ge=1)  # a part may take so many times what it takes on an H100
    students: list[StudentConfig] = Field(
        default=[
            StudentConfig(name="mrmae_vit_base_patch16"),
            StudentConfig(name="mrmae_convvit_base_patch16"),
            StudentConfig(name="mrmae_vit_large_patch16"),
        ]
    )
    teachers: list[TeacherConfig] = Field(  # students mimic the first one
        default=[
            TeacherConfig(spec="clip_vitb16", weights="random"),
            TeacherConfig(spec="timm:vit_large_patch16_dinov3", weights="random"),
        ],
        min_length=1,
    )
    sparse: list[str] = Field(default=["mrmae_convvit_base_patch16"])  # students with a sparse and a dense path
    image_size: int = Field(224, ge=32)  # of what is drawn, and of the views
    images: int = Field(1024, ge=16)  # that are drawn
    copies: int = Field(64, ge=1)  # how often extraction takes each of them, at most
    store: StoreName = "webdataset"
    batch_size: int = Field(256, ge=2)  # of students and teachers
    sparse_batch_size: int = Field(128, ge=1)
    seconds: float = Field(6, gt=0)  # that extraction is to last at the rate of the bare forward
    rounds: int = Field(3, ge=3)  # by turns, after one that warms up
    steps: int = Field(8, ge=1)  # of each lane in a round
    compile: bool = True  # measure compiled steps as well
    workers: int | None = Field(None, ge=0)  # decoding processes; default: the cores but two, 16 at most
    folder: PathField | None = None  # for images and caches; the system's temporary folder when left out
