"""Frozen features of labelled images: what `knn` and `linear-probe` both start from.

The subject is a checkpoint, an untrained student, a teacher, or raw pixels: the references that a number needs.
Features are kept in a folder, by what they are features of: the weights, the images' bytes, how these are shown. A
second command reads the images, which is cheap beside decoding them, and finds what the first one computed.
"""

import json
import logging
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from pipeline.assembly.subjects import Subject, load_subject, share_or_last
from pipeline.configs.data import ViewConfig
from pipeline.configs.evaluation import FrozenConfig
from pipeline.data.images import ImageSource
from pipeline.data.labelled import LabelledDataset, open_splits
from pipeline.data.loader import Request, load_in_order
from pipeline.data.rendering import preprocessing
from pipeline.data.slots import Empty
from pipeline.evaluation.features import FeatureFiles, FeatureSets, content_digest, extract_features
from pipeline.files import hash_source
from pipeline.processes import gather_rows, processes
from pipeline.progress import track

log = logging.getLogger(__name__)


def frozen_features(config: FrozenConfig) -> FeatureSets:
    """The features of both sets: kept ones if the folder has them, else by one forward pass that processes share.

    Raises:
        DataError: no labels, or labels in one set that the other doesn't have.
    """
    train, val, classes = open_splits(config.data, config.val)
    torch.manual_seed(config.seed)
    subject = _pixels(config) if config.pixels else load_subject(config, processes().device)
    workers = config.data.workers, (config.val or config.data).workers
    train_x, train_y = _features(config, subject, train, workers[0], "train")
    val_x, val_y = _features(config, subject, val, workers[1], "val")
    return FeatureSets(train_x, train_y, val_x, val_y, classes)


def _features(
    config: FrozenConfig, subject: Subject, source: ImageSource, workers: int, split: str
) -> tuple[Tensor, Tensor]:
    folder = config.features or (config.output / "features" if config.output else None)
    files = FeatureFiles(folder, _description(config, subject, source, split)) if folder else None
    labels = torch.from_numpy(source.labels)
    kept = None
    # All or none: one that finds nothing, as on a node without that disk, would wait for the others' shares for ever.
    if all(gather_object([files is not None and files.any()])) and files is not None:
        kept = files.read(_content(source, workers, split))
    if all(gather_object([kept is not None and len(kept) == len(labels)])) and kept is not None:
        return kept, labels
    hashes: list[int] = []
    batches = _batches(config, subject, source, workers, split, hashes)
    share, _ = extract_features(lambda images: subject.tokens(images).mean(1), batches)
    features, content = gather_rows(share, len(source)), _digest(hashes, len(source))
    if files and processes().is_main_process:
        _keep(files, features, content)
    return features, labels


def _keep(files: FeatureFiles, features: Tensor, content: str) -> None:
    """Keep the features for a later command, if the disk takes them: this one goes on without."""
    try:
        files.write(features, content)
    except (OSError, SafetensorError) as error:
        log.warning("the features can't be kept for the next command: %s", error)


def _description(config: FrozenConfig, subject: Subject, source: ImageSource, split: str) -> dict[str, str]:
    """What decides the features, but for the images' bytes."""
    shown = preprocessing(ViewConfig(image_size=subject.size), "zarr")
    return {
        "subject": subject.name,
        "split": split,
        "data": source.digest(),
        "size": str(subject.size),
        "crop": str(config.crop),
        "preprocessing": json.dumps(shown, sort_keys=True),
    }


class _Hashes:
    """Reads and hashes images, decodes none; an `IndexedDataset`."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> list[int]:
        return [hash_source(self._source.read(index)) for _, index in requests]


def _content(source: ImageSource, workers: int, split: str) -> str:
    """The digest of the images' bytes as they are now; processes share the reading."""
    share = share_or_last(len(source))
    batches = load_in_order(_Hashes(source), share, 64, workers)
    hashes: list[int] = []
    for batch in track(batches, -(-len(share) // 64), f"reading ({split})", "batch"):
        hashes += batch
    return _digest(hashes, len(source))


def _digest(hashes: list[int], total: int) -> str:
    """The digest of all images' hashes, of which this process brought those of its share."""
    return content_digest(gather_rows(torch.from_numpy(np.array(hashes, np.uint64).view(np.int64)), total))


def _pixels(config: FrozenConfig) -> Subject:
    """Raw pixels: one token of all of them."""
    return Subject(lambda images: images.float().flatten(1)[:, None] / 255, config.image_size or 224, (1, 1), "pixels")


def _batches(
    config: FrozenConfig, subject: Subject, source: ImageSource, workers: int, split: str, hashes: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of this process's share; the hashes of the files that were read are added to `hashes`."""
    share = share_or_last(len(source))
    dataset = LabelledDataset(source, subject.size, crop=config.crop)
    batches = load_in_order(dataset, share, config.eval_batch_size, workers)
    for batch in track(batches, -(-len(share) // config.eval_batch_size), f"features ({split})", "batch"):
        hashes += batch.hashes
        yield batch.images, batch.labels
