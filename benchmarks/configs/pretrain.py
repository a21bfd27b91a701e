"""The keys of `benchmark pretrain`."""

from pydantic import Field

from pipeline.config import Config, PathField, Precision
from pipeline.configs.cache import QuantiserName, StoreName
from pipeline.configs.data import DataConfig
from pipeline.configs.models import StudentConfig
from pipeline.configs.teachers import TeacherConfig


class LaneConfig(Config):
    """What the lanes of a comparison have in common."""

    student: StudentConfig = StudentConfig(name="mrmae_vit_tiny_patch16")
    batch_size: int = Field(32, ge=2)
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    compile: bool = False  # torch.compile students and teachers
    workers: int = Field(0, ge=0)  # decoding processes a lane; 0 puts a lane's loading into its own time
    steps: int = Field(1, ge=1)  # of each lane in a round
    seed: int = 0


class BenchmarkPretrainConfig(LaneConfig):
    """What is measured. The defaults take about ten minutes of two cores."""

    data: DataConfig | None = None  # images; drawn ones of 224 x 224 when left out
    images: int = Field(128, ge=16)  # of the dataset; they come round again
    teachers: list[TeacherConfig] = Field(
        default=[
            TeacherConfig(spec="timm:vit_tiny_patch16_224", weights="random"),
            TeacherConfig(spec="timm:vit_base_patch16_224", weights="random"),
        ],
        min_length=1,
    )
    store: StoreName = "zarr"
    quantiser: QuantiserName = "int8"
    precision: Precision = "auto"
    rounds: int = Field(21, ge=3)  # after one that warms up; medians over the rounds' own ratios
    threads: int | None = Field(default=None, gt=0)  # CPU threads; torch's choice unless given
    folder: PathField | None = None  # where the caches go; the system's temporary folder when left out
