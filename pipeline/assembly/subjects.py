"""A frozen network as a function of images: a checkpoint, an untrained student or a teacher, all asked alike.

What is computed of single images is gathered from all processes here, and what can't be read is named.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pipeline.assembly.students import load_encoder, tokens_of
from pipeline.assembly.teachers import load_teacher
from pipeline.configs.data import GivenImages
from pipeline.configs.evaluation import SubjectConfig
from pipeline.data.crops import CentralCrops, EncodedImages, ImageFiles
from pipeline.data.images import open_images
from pipeline.data.loader import load_in_order
from pipeline.data.readable import warn_of_unreadable
from pipeline.errors import ConfigError
from pipeline.evaluation.features import extract_features
from pipeline.models import Classifier, model_record
from pipeline.processes import gather_rows, processes, share_of
from pipeline.progress import track
from pipeline.weights import state_digest


class Subject(NamedTuple):
    """What is frozen.

    Attributes:
        tokens: uint8 images [B, 3, S, S] → patch tokens [B, L, D], row by row of the grid.
        size: S, pixels.
        grid: (h, w) cells, L of them.
        name: what it is, by the digest of its weights.
    """

    tokens: Callable[[Tensor], Tensor]
    size: int
    grid: tuple[int, int]
    name: str


def load_subject(config: SubjectConfig, device: torch.device) -> Subject:
    """The network that `init`, `student` or `teacher` name.

    Raises:
        ConfigError, CheckpointError, TeacherError: as `load_encoder` and `load_teacher`; another image_size than the
            student's.
    """
    if config.teacher is not None:
        teacher = load_teacher(config.teacher, device)
        # All of it: QuickGELU and GELU, or two normalisations of pixels, may share weights.
        name = f"teacher {json.dumps(teacher.identity(), sort_keys=True)}"
        size = config.image_size or teacher.image_size
        return Subject(lambda images: teacher(images.to(device)).tokens, size, teacher.grid, name)
    model = load_encoder(config.init, config.student)
    encoder = model if isinstance(model, Classifier) else model.encoder
    size = encoder.image_size[0]
    if config.image_size not in (None, size):
        raise ConfigError(
            f"image_size={config.image_size}, but the model was built for {size} pixels: "
            "leave it out, or give student.image_size as well"
        )
    described = json.dumps(model_record(model), sort_keys=True)
    name = f"model {state_digest(model.state_dict())} {described}"
    return Subject(tokens_of(model, device), size, encoder.grid, name)


class Encoded(NamedTuple):
    """What was computed of N images.

    Attributes:
        rows: float32 [N, ...], on the CPU; the row of an image that can't be read says nothing.
        faults: index → why the image can't be read.
    """

    rows: Tensor
    faults: dict[int, str]

    @property
    def readable(self) -> list[int]:
        """Indices of the rows that say something."""
        return [index for index in range(len(self.rows)) if index not in self.faults]


def encode_given(config: GivenImages, encode: Callable[[Tensor], Tensor], size: int) -> tuple[EncodedImages, Encoded]:
    """The images that a config gives, and what `encode` makes of their central crops; processes share them.

    Images that can't be read stop nothing: a warning names them.

    Args:
        encode: uint8 images [B, 3, S, S] → rows [B, ...].
        size: S, pixels.
    """
    source: EncodedImages = ImageFiles(config.images)
    workers, called = 0, "images"
    if config.data is not None:
        source, workers, called = open_images(config.data.path, config.data.limit), config.data.workers, "data.path"
    share = share_or_last(len(source))
    faults: dict[int, str] = {}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        crops = CentralCrops(source, size, config.crop)
        loaded = load_in_order(crops, share, config.eval_batch_size, workers)
        for batch in track(loaded, -(-len(share) // config.eval_batch_size), "images", "batch"):
            faults.update(batch.faults)
            yield batch.images, torch.empty(len(batch.images))

    rows, _ = extract_features(encode, batches())
    gathered = Encoded(gather_rows(rows, len(source)), dict(sorted(gather_object(list(faults.items())))))
    if processes().is_main_process:
        warn_of_unreadable(called, source, gathered.faults)
    return source, gathered


def share_or_last(count: int) -> Sequence[int]:
    """This process's share. Where that is empty, the last image: `gather_rows` leaves that row out."""
    return share_of(count) or range(count - 1, count)
