"""How the images of an epoch fall into steps, and a step into micro-batches and processes."""

from dataclasses import dataclass


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
