"""Say which classes images belong to.

    mrmae predict init=runs/flowers data.path=/data/photos output=photos.csv
    mrmae predict init=runs/flowers images=[cat.jpg,dog.jpg]

Reads images of any kind (data.path, or images=[FILE,...]) and a classifier (init): a fine-tuned run, a checkpoint or an
export. Writes a row for each image to output, CSV or JSON lines by its ending; without output it prints CSV. Costs one
forward pass.

Classes have the names that they were trained under; those that were numbers stay numbers, unless finetune was given
class_names. An image that can't be read has a row that says why.
"""

import torch
from torch import Tensor

from pipeline.assembly.students import load_classifier
from pipeline.assembly.subjects import encode_given
from pipeline.evaluation.predictions import Prediction, check_format, format_predictions
from pipeline.files import write_text
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from stages.configs.predict import PredictConfig


@stage
def run(config: PredictConfig) -> str:
    """Write the rows; returns the line to show, or CSV if there is no `output`.

    Raises:
        ConfigError: the ending of `output` names no format.
        CheckpointError: `init` holds no classifier.
    """
    check_format(config.output)
    state = processes()
    model, names, _ = load_classifier(config.init, config.student, config.image_size)
    model.to(state.device).eval()
    top = min(config.top, len(names))

    def encode(images: Tensor) -> Tensor:
        """The highest probabilities and their classes: [B, 2, top]."""
        probabilities = model(normalise(images.to(state.device))).float().softmax(-1)
        return torch.stack(probabilities.topk(top), 1)

    source, encoded = encode_given(config, encode, model.image_size[0])
    rows = [
        Prediction(source.key(index), [], encoded.faults[index])
        if index in encoded.faults
        else Prediction(source.key(index), [(names[int(label)], float(p)) for p, label in row.T], "")
        for index, row in enumerate(encoded.rows)
    ]
    text = format_predictions(rows, top, config.output)
    if config.output is None:
        return text.removesuffix("\n")
    if state.is_main_process:
        write_text(config.output, text)
    return f"{len(rows)} images, {len(encoded.faults)} of them unreadable: {config.output}"
