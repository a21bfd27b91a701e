"""Write the features of images to a file.

    mrmae embed init=runs/photos data.path=/data/photos output=photos.safetensors
    mrmae embed teacher.spec=dino_vitb16 images=[cat.jpg,dog.jpg] pool=none output=tokens.npz

Reads images of any kind (data.path, or images=[FILE,...]) and a checkpoint or an export (init), or a teacher
(teacher.spec). Writes one file, by the ending of output: safetensors, npz or parquet. Costs one forward pass; the
features of all images are in memory at once.

A feature is the mean of the patch tokens, as knn and linear-probe read it. Images that can't be read are named and left
out.
"""

import json
from typing import Any

import torch
from torch import Tensor

from pipeline.assembly.subjects import encode_given, load_subject
from pipeline.data.images import ImageSource
from pipeline.errors import DataError
from pipeline.evaluation.embeddings import Embeddings, check_format, write_embeddings
from pipeline.ownership import stage
from pipeline.processes import processes
from stages.configs.embed import EmbedConfig


@stage
def run(config: EmbedConfig) -> dict[str, Any]:
    """Write the file; returns where it lies, its shape, and how many images were left out.

    Raises:
        ConfigError: the ending of `output` names no format that can be written.
        DataError: no image can be read.
    """
    check_format(config.output)
    state = processes()
    torch.manual_seed(config.seed)
    subject = load_subject(config, state.device)

    def encode(images: Tensor) -> Tensor:
        tokens = subject.tokens(images)
        return tokens.mean(1) if config.pool == "mean" else tokens.unflatten(1, subject.grid)

    source, encoded = encode_given(config, encode, subject.size)
    readable = encoded.readable
    if not readable:
        raise DataError(f"none of {len(source)} images can be read ({source.key(0)}: {encoded.faults[0]})")
    facts = {
        "subject": subject.name,
        "init": str(config.init or ""),
        "pool": config.pool,
        "image_size": str(subject.size),
        "crop": str(config.crop),
        "unreadable": json.dumps({source.key(index): fault for index, fault in encoded.faults.items()}),
    }
    labels = None
    if isinstance(source, ImageSource) and (source.labels >= 0).any():
        labels = source.labels[readable]
        facts["classes"] = json.dumps(source.classes)
    embeddings = Embeddings([source.key(index) for index in readable], encoded.rows[readable].numpy(), labels, facts)
    if state.is_main_process:
        write_embeddings(config.output, embeddings)
    return {"written": str(config.output), "features": list(embeddings.features.shape), "left_out": len(encoded.faults)}
