"""One run of training: its processes, its precision, its folder, and how a global batch falls into steps.

output/
    config.yaml      the resolved config of the newest start; each checkpoint has that of its own
    metrics.jsonl    one row every `log_every` steps, and one per evaluation
    train.log        what the run said, with times; starts.jsonl: each start's command, host, versions and commit
    tensorboard/     the same, for TensorBoard
    wandb-id         the name of the run at Weights & Biases, so that a resumed run goes on with the same curves
    checkpoints/     step-N (the last `keep_checkpoints`) and best
    run.lock         host, process and time of the one that writes the folder now
"""

import importlib.util
import json
import logging
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import gather_object

from pipeline.config import save_config
from pipeline.configs.training import RunConfig, ShardedRunConfig
from pipeline.errors import CheckpointError, ConfigError, TrainingError
from pipeline.files import clean_folder, write_text
from pipeline.locks import lock_folder
from pipeline.ownership import closed_with_stage
from pipeline.plugins import plugin_hashes
from pipeline.processes import open_accelerator, processes, without_cuda
from pipeline.steps import StepPlan, fit_batch_size
from pipeline.training.checkpoint import Checkpoint, newest_checkpoint, recorded_identity, step_folders
from pipeline.training.interruption import Interrupted
from pipeline.training.journal import Journal

log = logging.getLogger(__name__)


R = TypeVar("R", bound=RunConfig)


def settle_batch_size(config: R, images: int, per_image: int = 1, largest: int = 1024) -> R:
    """The config with a number for batch_size=auto: that of the run in `output`, else what `images` allow.

    Micro-batches are even, as mixup wants them.

    Args:
        images: of an epoch.
        per_image: masks that are trained of each image; batch_size counts masks.
        largest: what auto begins with.
    """
    if config.batch_size != "auto":
        return config
    size = recorded_identity(config.output).get("batch_size")
    if size is None:
        unit = 2 * processes().num_processes * config.accum_iter * per_image
        size = fit_batch_size(images, unit, per_image, largest)
    return config.model_copy(update={"batch_size": size})


def plan_steps(config: RunConfig, images: int, per_image: int = 1) -> StepPlan:
    """Divide `images` an epoch into global batches; the remainder goes unseen that epoch. batch_size is a number.

    Args:
        per_image: masks that are trained of each image; batch_size counts masks.

    Raises:
        TrainingError: the batch doesn't divide, or an epoch holds less than one batch.
    """
    state, batch_size = processes(), config.batch_size
    assert isinstance(batch_size, int)
    unit = state.num_processes * config.accum_iter * per_image
    if batch_size % unit:
        raise TrainingError(
            f"batch_size={batch_size} is no multiple of {unit} ({state.num_processes} processes x "
            f"accum_iter={config.accum_iter} x {per_image} masks a sample): choose for instance "
            f"{max(unit, batch_size // unit * unit)}"
        )
    steps = images // (batch_size // per_image)
    if not steps:
        raise TrainingError(
            f"batch_size={batch_size} asks for more than the {images} images of an epoch: lower batch_size"
        )
    total = min(config.epochs * steps, config.max_steps or config.epochs * steps)
    return StepPlan(steps, total, batch_size, config.accum_iter, state.num_processes, state.process_index, per_image)


class Run:
    """Opens the output folder, finds where to go on, and holds accelerate's view of the processes.

    Args:
        identity: JSON-able; what must not change between stop and resume. Seed and batch size are added.
        may_change: keys of it that cost a warning alone, since the run can go on, though not as it would have;
            precision, compile and the plug-ins, which it adds, are such keys.

    Raises:
        ConfigError: the folder can't be written, or holds a run and resume=never.
        CheckpointError: the folder's run has another identity, none of its checkpoints is whole, or the processes see
            different ones.
        ConfigError: another process writes the folder.
    """

    def __init__(self, config: RunConfig, identity: dict[str, Any], may_change: Collection[str] = ()) -> None:
        mixed_precision = mixed_precision_of(config.precision)
        numbers: dict[str, Any] = {"precision": mixed_precision.replace("no", "fp32"), "compile": config.compile}
        if plugins := plugin_hashes():
            numbers["plugins"] = plugins
        self.config = config
        self.identity = {"seed": config.seed, "batch_size": config.batch_size} | identity | numbers
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        if config.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError("wandb=true, but Weights & Biases isn't installed: pip install -e '.[wandb]'")
        self.accelerator = open_accelerator(mixed_precision, self.folder)
        self.lock = closed_with_stage(lock_folder(self.folder)) if self.is_main else None
        self.journal: Journal | None = None  # of the first process, while it trains
        self.resumed = self._find_checkpoint({*may_change, *numbers})
        # Every process has looked before the first one writes into the folder.
        self._agree()
        if self.is_main:
            self._open_folder()
            self._open_trackers()

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a share of the model; one process alone has nobody to share with."""
        return isinstance(self.config, ShardedRunConfig) and self.config.sharding == "fsdp" and self.processes > 1

    @property
    def start_step(self) -> int:
        return self.resumed.step if self.resumed else 0

    def say(self, *lines: str, on_screen: bool = True) -> None:
        """Tell lines, if this is the first process."""
        if self.journal:
            for line in lines:
                self.journal.say(line, on_screen=on_screen)

    def __enter__(self) -> "Run":
        if self.is_main:
            try:
                self.journal = Journal(self.folder)
            except OSError as error:
                raise ConfigError(f"output={self.folder} can't be written: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Finish the log and the trackers; those that people watch say whether the run failed. Let go of the folder."""
        if self.journal:
            if kind is not None:
                self.say(f"ended by {kind.__name__}: {error}", on_screen=False)
            self.journal.close()
            self.journal = None
        failed = kind is not None and not issubclass(kind, Interrupted)
        try:
            for tracker in self.accelerator.trackers:
                if isinstance(tracker, WandBTracker):
                    tracker.run.finish(exit_code=int(failed))
                else:
                    tracker.finish()
        except Exception:
            if kind is None:
                raise
            log.debug("a tracker could not finish", exc_info=True)  # as on a full disk: the first error is what counts
        finally:
            if self.lock is not None:
                self.lock.close()

    def any_process(self, flag: bool) -> bool:
        """True everywhere if one process says so. It waits for the device: not for every step."""
        if self.processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.device), "sum"))

    def _find_checkpoint(self, may_change: Collection[str]) -> Checkpoint | None:
        found = newest_checkpoint(self.checkpoints)
        if found is None:
            if step_folders(self.checkpoints):
                raise CheckpointError(
                    f"output={self.folder} holds checkpoints, none of them whole: restore one, or move them away to "
                    "start anew"
                )
            return None
        if self.config.resume == "never":
            raise ConfigError(
                f"output={self.folder} holds a run already: choose another output, or resume=auto to go on"
            )
        for key, value in self.identity.items():
            former = found.identity.get(key, value)  # a run from before this key existed says nothing about it
            if former != value and key in may_change:
                log.warning(
                    "%s was %s when the run stopped and is %s now: it goes on, but not exactly", key, former, value
                )
            elif former != value:
                raise CheckpointError(
                    f"output={self.folder} holds a run with {key}={former}, this one has {key}={value}: "
                    "choose another output, or the former value to go on"
                )
        return found

    def _agree(self) -> None:
        """Processes that went on from different steps, or with different samples, would train apart in silence."""
        identity = {"step": self.start_step, **self.identity}
        answers = gather_object([json.dumps(identity, sort_keys=True)])
        if len(set(answers)) > 1:
            views = [json.loads(answer) for answer in answers]
            key = next(key for key in identity if any(view[key] != identity[key] for view in views))
            raise CheckpointError(
                f"the processes disagree on {key} ({', '.join(sorted({str(view[key]) for view in views}))}): output, "
                "cache and data must be the same for all of them, on a disk that they share or as equal copies"
            )

    def _open_folder(self) -> None:
        try:
            for folder in (self.folder, self.checkpoints):
                clean_folder(folder)
            save_config(self.config, self.folder / "config.yaml")
        except OSError as error:
            raise ConfigError(f"output={self.folder} can't be written: {error.strerror or error}") from error

    def _open_trackers(self) -> None:
        trackers: list[GeneralTracker] = []
        if self.config.tensorboard:
            trackers.append(TensorBoardTracker("tensorboard", self.folder))
        if self.config.wandb:
            trackers.append(
                WandBTracker(
                    "mrmae",
                    id=_wandb_id(self.folder / "wandb-id"),
                    resume="allow",
                    name=self.folder.resolve().name,
                    dir=str(self.folder),
                    config=self.config.model_dump(mode="json"),
                )
            )
        for tracker in trackers:
            tracker.start()
        self.accelerator.trackers = trackers


def _wandb_id(file: Path) -> str:
    """The id that this run has had from its first start on."""
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8").strip()


def mixed_precision_of(choice: str) -> str:
    """accelerate's word, "bf16" or "no", for a config's `precision`."""
    if choice == "auto":
        return "bf16" if not without_cuda() and torch.cuda.is_bf16_supported() else "no"
    return "no" if choice == "fp32" else choice
