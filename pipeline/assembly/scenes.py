"""Labelled scenes from what a config names: a folder of label PNGs, or the masks of a COCO annotation file."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.configs.segmentation import LabelConfig, SceneConfig
from pipeline.data.class_names import read_class_names
from pipeline.data.images import open_images
from pipeline.data.readable import leave_unreadable_out
from pipeline.detection import CocoImages, open_coco, semantic_labels
from pipeline.errors import ConfigError, DataError
from pipeline.segmentation import FolderScenes, LabelCode, Scenes
from pipeline.segmentation.scenes import IGNORED


class CocoScenes:
    """COCO's masks as labels: class 0 is what no mask covers, crowds have no class; `Scenes`."""

    def __init__(self, coco: CocoImages) -> None:
        self.coco = coco

    def __len__(self) -> int:
        return len(self.coco)

    def key(self, index: int) -> str:
        return self.coco.key(index)

    def read(self, index: int) -> bytes:
        return self.coco.read(index)

    def label_map(self, index: int) -> NDArray[np.int16]:
        return semantic_labels(self.coco, index, ignored=IGNORED)


class OpenScenes:
    """Scenes, the names of their classes, and what they are, as a digest.

    Args:
        key: what messages call them.
        names: of the classes, for label PNGs whose `labels.class_names` isn't given; numbers without.
    """

    def __init__(self, key: str, config: SceneConfig, labels: LabelConfig, names: Sequence[str] = ()) -> None:
        self.scenes: Scenes
        if config.labels.suffix == ".json":
            (coco,) = leave_unreadable_out({key: open_coco(config.images, config.labels, config.limit)})
            coco.check_trainable(key)  # an object without a mask would be background in silence
            self.scenes, self.digest = CocoScenes(coco), coco.digest
            self.names = ("background", *(name for _, name in coco.categories))
            return
        if labels.num_classes is None:
            raise ConfigError(f"{key}.labels={config.labels} is a folder: give labels.num_classes=... as well")
        try:
            (source,) = leave_unreadable_out({key: open_images(str(config.images), config.limit)})
        except DataError as error:
            raise DataError(str(error).replace("data.path", f"{key}.images", 1)) from error
        code = LabelCode(labels.num_classes, labels.ignore_index, labels.reduce_zero_label)
        self.scenes, self.digest = FolderScenes(source, config.labels, code), source.digest()
        if labels.class_names is not None:
            self.names = read_class_names(labels.class_names, labels.num_classes)
        elif len(names) == labels.num_classes:
            self.names = tuple(names)
        else:
            self.names = tuple(map(str, range(labels.num_classes)))
