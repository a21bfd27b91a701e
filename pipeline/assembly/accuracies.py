"""Classifiers on labelled images: all processes share the images, each batch is read once for all models."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from pipeline.data.labelled import LabelledBatch, LabelledDataset
from pipeline.data.loader import load_in_order
from pipeline.evaluation.metrics import topk_hits
from pipeline.pixels import normalise
from pipeline.processes import gather_rows, processes, share_of
from pipeline.progress import Progress


class LabelledCrops(NamedTuple):
    """Images as an evaluation shows them, and how they are loaded."""

    dataset: LabelledDataset
    batch_size: int  # of a process
    workers: int

    def __len__(self) -> int:
        return len(self.dataset.source)

    def batches(self) -> Iterator[LabelledBatch]:
        """This process's share, on its device."""
        share, device = share_of(len(self)), processes().device
        for batch in load_in_order(self.dataset, share, self.batch_size, self.workers):
            yield batch.to(device)


def accuracies(
    models: Sequence[nn.Module], crops: LabelledCrops, soup: nn.Module | None = None
) -> tuple[list[dict[str, float]], Tensor]:
    """Over all processes, top-1 and top-5 of each model, of the mean of their logits if they are several, of `soup`.

    Also the class that the last of these predicts for each image: int64 [N], on the CPU.
    """
    state, several = processes(), len(models) > 1
    hits = torch.zeros(len(models) + several + (soup is not None), 3, dtype=torch.float64, device=state.device)
    predicted = [torch.empty(0, dtype=torch.int64, device=state.device)]
    batches = -(-len(share_of(len(crops))) // crops.batch_size)
    with Progress(batches, "evaluate", "batch", show=state.is_main_process) as progress:
        for batch in crops.batches():
            images = normalise(batch.images)
            rows = [model(images).float() for model in models]
            rows += [torch.stack(rows).mean(0)] if several else []
            rows += [soup(images).float()] if soup is not None else []
            for row, scores in enumerate(rows):
                hits[row, :2] += topk_hits(scores, batch.labels)
                hits[row, 2] += len(batch.labels)
            predicted.append(rows[-1].argmax(1))
            progress.advance()
    sums = reduce(hits, "sum")
    shares = [{"top1": float(row[0] / row[2]), "top5": float(row[1] / row[2])} for row in sums]
    return shares, gather_rows(torch.cat(predicted), len(crops))
