"""A run of training, its optimiser and its average of weights."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from pipeline.config import Config, PathField, Precision

_Beta = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Config):
    """What every training command takes."""

    output: PathField  # the run folder
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest sound checkpoint in output
    seed: int = Field(0, ge=0, lt=2**63)  # of the order, the masks, the weights and all that is drawn
    epochs: int = Field(100, ge=1)  # passes over the images
    max_steps: int | None = Field(None, ge=1)  # stop (and let the learning rate reach its minimum) at this step
    # Global: over all processes and accumulation. auto: the largest of 1024, 512, ... that leaves 8 steps an epoch
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    accum_iter: int = Field(1, ge=1)  # micro-batches per step in each process
    precision: Precision = "auto"  # auto: bf16 on CUDA, fp32 on a CPU
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps after
    peak_tflops: float | None = Field(None, gt=0)  # dense bf16 TFLOP/s of the card, for mfu; default: by its name
    log_every: int = Field(20, ge=1)  # steps
    checkpoint_every: int = Field(1000, ge=1)  # steps
    keep_checkpoints: int = Field(2, ge=1)  # newest ones that are kept, beside the best
    tensorboard: bool = True  # curves in output/tensorboard
    wandb: bool = False  # curves at Weights & Biases, which must be installed


class OptimConfig(Config):
    """AdamW with warm-up and a cosine; the rate is given per 256 images, as in MAE."""

    blr: float = Field(1.5e-4, ge=0)  # base learning rate: lr = blr × batch_size / 256
    lr: float | None = Field(None, ge=0)  # absolute learning rate; in place of blr
    min_lr: float = Field(0.0, ge=0)  # learning rate at the end
    warmup_epochs: float | None = Field(None, ge=0)  # null: a tenth of the run, as 40 of 400 epochs in the paper
    weight_decay: float = Field(0.05, ge=0)  # of weight matrices; biases, norms and positions have none
    betas: Annotated[tuple[_Beta, _Beta], Strict(False)] = (0.9, 0.95)  # of AdamW
    layer_decay: float = Field(1.0, gt=0, le=1)  # rate of layer i × layer_decay^(depth + 1 - i), fine-tuning only
    clip_grad: float | None = Field(None, gt=0)  # maximal gradient norm

    def peak_lr(self, batch_size: int) -> float:
        return self.lr if self.lr is not None else self.blr * batch_size / 256


class EmaConfig(Config):
    """Exponential moving average of a model's weights (Polyak and Juditsky 1992, as Inception and DeiT train)."""

    decay: float | None = Field(None, gt=0, lt=1)  # share kept at each step, such as 0.9999; null: no average
    warmup: bool = True  # decay rises from 0 as 1 - step^(-2/3), so that short runs forget their first weights too
