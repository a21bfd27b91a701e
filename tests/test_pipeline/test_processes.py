"""What accelerate is told, whatever the environment says to it."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend

from pipeline.errors import ConfigError
from pipeline.processes import open_accelerator, processes, share_of, without_cuda


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """accelerate's state is one for the whole process: what the first one to ask was given, all later ones see."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


def test_variables_of_accelerate_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {
        "GRADIENT_ACCUMULATION_STEPS": "4", "MIXED_PRECISION": "fp16", "DYNAMO_BACKEND": "inductor",
        "DYNAMO_MODE": "max-autotune", "DYNAMO_USE_FULLGRAPH": "true", "DOWNCAST_BF16": "1", "USE_FSDP": "false",
        "USE_DEEPSPEED": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    accelerator = open_accelerator("no", tmp_path)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert accelerator.scaler is None


@pytest.mark.parametrize("variable", ["USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"])
def test_other_ways_of_training_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", "true")
    for start in (processes, lambda: open_accelerator("no", tmp_path)):
        with pytest.raises(ConfigError, match=rf"^ACCELERATE_{variable}=true in the environment asks for .*: unset it"):
            start()


def test_a_launcher_for_cpus_is_heard_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu` on a machine with a GPU: every stage, and the precision, follow."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not without_cuda()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert without_cuda()
    assert processes().device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=perhaps in the environment is neither true nor false"):
        processes()


def test_samples_are_shared_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        state = SimpleNamespace(process_index=rank, num_processes=3)
        monkeypatch.setattr("pipeline.processes.processes", lambda state=state: state)
        shares.append(list(share_of(5)))
    assert shares == [[0, 3], [1, 4], [2]]
