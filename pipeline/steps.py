"""How the images of an epoch fall into steps, and a step into micro-batches and processes."""

from dataclasses import dataclass

_STEPS_AN_EPOCH = 8  # that a batch size of "auto" leaves, if the images allow it


def fit_batch_size(images: int, unit: int = 1, per_image: int = 1, largest: int = 1024) -> int:
    """The largest of `largest`, half of it, a quarter, ... that leaves an epoch 8 steps or more.

    Args:
        images: of an epoch.
        unit: the result is a multiple of it, and at least it.
        per_image: trained views of each image; the result counts views.
    """
    size = largest
    while size > unit and images * per_image // size < _STEPS_AN_EPOCH:
        size //= 2
    return max(unit, size // unit * unit)


@dataclass(frozen=True)
class StepPlan:
    """How many steps, of how many images, split how."""

    steps_per_epoch: int
    total_steps: int
    batch_size: int  # trained views of a step, over all processes and micro-batches
    accum_iter: int  # micro-batches of a step in each process
    processes: int
    rank: int = 0  # of this process
    per_image: int = 1  # trained views of each image that is read: masks_per_sample

    @property
    def images_per_step(self) -> int:
        """Images that all processes read for a step."""
        return self.batch_size // self.per_image

    @property
    def micro_batch(self) -> int:
        """Trained views of one micro-batch in one process."""
        return self.batch_size // (self.processes * self.accum_iter)
