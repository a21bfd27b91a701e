"""Which student a config and a checkpoint mean together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.assembly.students import load_encoder, student_arguments
from pipeline.configs.models import StudentConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models import Classifier, Student, build_classifier, build_student, save_weights

NAME = "mrmae_convvit_small_patch16"
SIZES = {"image_size": 64, "dim": 48, "depth": 1, "num_heads": 3}
SPEC = {"kind": "student", "name": NAME, **SIZES, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"name": NAME, "depth": 2}, {"depth": 2}),
        ({"depth": None}, {}),
    ],
    ids=str,
)
def test_keys_that_are_given_go_over_the_checkpoints(given: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    student = None if given is None else StudentConfig.model_validate(given)
    described = {key: value for key, value in SPEC.items() if key != "kind"}
    assert student_arguments(None, student, SPEC) == {**described, **expected}


@pytest.mark.parametrize("name", ["mrmae_vit_base_patch16", "mrmae_vit_tiny_patch16"])
def test_another_name_stands_alone(name: str) -> None:
    """Also if it is the default's: what counts is that it was given."""
    student = StudentConfig(name=name, depth=2)
    expected = {"name": name, "depth": 2, "decoder": "full", "gradient_checkpointing": False}
    assert student_arguments(None, student, SPEC) == expected == student_arguments(None, student, None)


def test_without_a_description_the_student_is_named() -> None:
    for student in (None, StudentConfig(depth=2)):
        with pytest.raises(ConfigError, match=r"init=a\.pth doesn't say what it is: give student\.name"):
            student_arguments(Path("a.pth"), student, None)
        with pytest.raises(ConfigError, match=r"give init=RUN, or student\.name"):
            student_arguments(None, student, None)


@pytest.mark.parametrize("kind", ["student", "classifier"])
def test_an_encoder_is_loaded_at_another_size(tmp_path: Path, kind: str) -> None:
    sizes = {key: value for key, value in SPEC.items() if key != "kind"}
    encoder = {"name": NAME, **SIZES}
    model = build_student(**sizes, objective="mae") if kind == "student" else build_classifier(num_classes=3, **encoder)
    save_weights(model, tmp_path)
    # As a section of a config that serves several commands gives it, with the decoder.
    student = StudentConfig.model_validate({"image_size": 96, "decoder_depth": 1})
    again = load_encoder(tmp_path, student)
    assert isinstance(again, Student) == (kind == "student")
    assert again.encoder.image_size == (96, 96)
    assert len(again.state_dict()) == len(model.state_dict())
    with pytest.raises(CheckpointError, match="don't fit this model"):
        load_encoder(tmp_path, StudentConfig(depth=2))


@pytest.mark.parametrize("name", [NAME, "mrmae_vit_tiny_patch16"])
def test_the_lone_file_of_a_classifier_that_pools_by_the_mean_is_a_subject(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_classifier(name, 3, **SIZES)
    file = tmp_path / "public.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    again = load_encoder(file, StudentConfig.model_validate({"name": name, **SIZES}))
    assert isinstance(again, Classifier)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again.eval().forward_tokens(images), model.eval().forward_tokens(images))
    assert "doesn't say how pixels were normalised" in caplog.text
