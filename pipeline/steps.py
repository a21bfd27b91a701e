"""How the images of an epoch fall into steps, and a step into micro-batches and processes."""

from dataclasses import dataclass

from pipeline.errors import TrainingError


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

    @classmethod
    def of(
        cls,
        images: int,
        *,
        batch_size: int,
        accum_iter: int,
        epochs: int,
        max_steps: int | None,
        per_image: int = 1,
        processes: int = 1,
        rank: int = 0,
    ) -> "StepPlan":
        """Divide `images` an epoch into global batches; the remainder goes unseen that epoch.

        Raises:
            TrainingError: the batch doesn't divide, or an epoch holds less than one batch.
        """
        unit = processes * accum_iter * per_image
        if batch_size % unit:
            raise TrainingError(
                f"batch_size={batch_size} is no multiple of {unit} ({processes} processes x "
                f"accum_iter={accum_iter} x {per_image} masks a sample): choose for instance "
                f"{max(unit, batch_size // unit * unit)}"
            )
        steps = images // (batch_size // per_image)
        if not steps:
            raise TrainingError(
                f"batch_size={batch_size} asks for more than the {images} images of an epoch: lower batch_size"
            )
        total = min(epochs * steps, max_steps or epochs * steps)
        return cls(steps, total, batch_size, accum_iter, processes, rank, per_image)

    @property
    def images_per_step(self) -> int:
        """Images that all processes read for a step."""
        return self.batch_size // self.per_image

    @property
    def micro_batch(self) -> int:
        """Trained views of one micro-batch in one process."""
        return self.batch_size // (self.processes * self.accum_iter)
