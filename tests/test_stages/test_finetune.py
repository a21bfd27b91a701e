"""finetune: other sizes and layouts of data, and `--eval` of one classifier or several."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import cli
from pipeline.config import load_config
from pipeline.configs.data import DataConfig
from pipeline.data.labelled import LabelledDataset, open_labelled
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation import topk_accuracy
from pipeline.evaluation.records import read_records
from pipeline.models import Classifier, build_student, load_model, save_weights
from pipeline.pixels import normalise
from pipeline.training.checkpoint import resolve_checkpoint
from stages import finetune
from stages.finetune import EvaluateConfig, FinetuneConfig
from tests.test_stages.conftest import ENCODER, PLAIN, finetune_config, sets

CONV = {"name": "mrmae_convvit_small_patch16", "image_size": 64, "dim": 48, "depth": 1, "num_heads": 3}


@pytest.fixture(scope="module")
def classifiers(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs from scratch, of which neither is perfect."""
    root = tmp_path_factory.mktemp("classifiers")
    for seed in (0, 1):
        finetune.run(finetune_config(colours, root / str(seed), student=ENCODER, seed=seed, max_steps=4 + seed))
    return [root / "0", root / "1"]


def evaluation(colours: Path, *init: Path, **changes: Any) -> EvaluateConfig:
    keys = {"init": [str(path) for path in init], "val": sets(colours)["val"], "crop": 0.875}
    return EvaluateConfig.model_validate({**keys, **changes})


def test_evaluation_alone_says_what_training_said(colours: Path, classifiers: list[Path], tmp_path: Path) -> None:
    trained = finetune.run(
        finetune_config(colours, classifiers[0], student=ENCODER, max_steps=4)
    )  # resumed: at its end
    found = finetune.evaluate(evaluation(colours, classifiers[0], output=str(tmp_path)))
    assert (found["top1"], found["top5"], found["images"]) == (trained["top1"], trained["top5"], 12)
    assert read_records(tmp_path / "metrics.json")["finetune_eval"]["init"] == [str(classifiers[0])]


def test_several_are_averaged_at_the_logits(colours: Path, classifiers: list[Path]) -> None:
    found = finetune.evaluate(evaluation(colours, *classifiers))
    models = [load_model(resolve_checkpoint(path)).eval() for path in classifiers]
    val = open_labelled("val.path", DataConfig(**sets(colours)["val"]))
    batch = LabelledDataset(val, 64).__getitems__([(0, index) for index in range(len(val))])
    with torch.inference_mode():
        logits = [model(normalise(batch.images)) for model in models]
    assert {key: found[key] for key in ("top1", "top5")} == topk_accuracy(sum(logits) / 2, batch.labels)
    each = [topk_accuracy(one, batch.labels)["top1"] for one in logits]
    assert list(found["each"].values()) == each


def test_averaging_logits_is_not_averaging_probabilities(
    colours: Path, classifiers: list[Path], tmp_path: Path
) -> None:
    """One says class 2 for sure, the other denies it still more surely: their mean logits say 0, probabilities 2."""
    for name, bias in (("sure", [0.0, 0.0, 10.0]), ("denies", [1.0, 0.0, -12.0])):
        model = load_model(resolve_checkpoint(classifiers[0]))
        assert isinstance(model, Classifier)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor(bias))
        (tmp_path / name).mkdir()
        save_weights(model, tmp_path / name)
    val = {**sets(colours)["val"], "limit": 5}  # labels 0, 0, 1, 1, 2
    found = finetune.evaluate(evaluation(colours, tmp_path / "sure", tmp_path / "denies", val=val))
    assert found["top1"] == pytest.approx(2 / 5)
    assert list(found["each"].values()) == pytest.approx([1 / 5, 2 / 5])


@pytest.mark.parametrize("part", ["mixup", "cutmix"])
def test_mixing_wants_even_micro_batches(colours: Path, tmp_path: Path, part: str) -> None:
    keys: dict[str, Any] = {"student": ENCODER, "batch_size": 6, "accum_iter": 2, "max_steps": 1}
    with pytest.raises(ConfigError, match=r"gives 3 images each .*: choose for instance batch_size=8, or augment") as e:
        finetune.run(finetune_config(colours, tmp_path / "out", **keys, augment={**PLAIN, part: 0.5}))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    finetune.run(finetune_config(colours, tmp_path / "out", **keys, augment=PLAIN))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("augment.scale=[0.5,0.2]", r"augment\.scale=\[0\.5, 0\.2\]: needs 0 < low <= high <= 1"),
        ("augment.rand_augment=m9", r"augment\.rand_augment='m9' is no policy of timm's"),
        ("augment.rand_augment=rand-m9.5", r"augment\.rand_augment='rand-m9\.5' is no policy"),
        ("augment.rand_augment=rand-x9", r"augment\.rand_augment='rand-x9' is no policy"),
    ],
)
def test_augmentation_that_can_not_be_drawn_is_refused_with_the_config(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, None, ["data.path=/x", "output=/y", key])


def test_one_key_of_the_optimiser_leaves_the_rest_of_the_recipe() -> None:
    config = load_config(FinetuneConfig, None, ["data.path=/x", "output=/y", "optim.clip_grad=1"])
    assert config.optim == FinetuneConfig.model_fields["optim"].default.model_copy(update={"clip_grad": 1.0})
    assert config.optim.layer_decay == 0.65


def test_rand_augment_is_bicubic(colours: Path, tmp_path: Path) -> None:
    """Left to itself, timm draws bilinear or bicubic anew for each image."""
    augment: Any = finetune._augment(finetune_config(colours, tmp_path, augment={}), 64)
    assert {op.hparams["interpolation"] for op in augment.ops} == {Image.Resampling.BICUBIC}


def test_the_command_takes_a_whole_section(colours: Path, classifiers: list[Path], tmp_path: Path) -> None:
    """The keys of training may stand beside: one section of a file serves both."""
    file = tmp_path / "chain.yaml"
    file.write_text(
        f"finetune: {{data: {{path: /absent}}, val: {{path: {colours}/val}}, epochs: 3, output: {tmp_path}/out}}"
    )
    init = f"init=[{classifiers[0]},{classifiers[1]}]"
    result = CliRunner().invoke(cli.main, ["finetune", "--eval", "--config", str(file), init])
    assert result.exit_code == 0, result.output
    assert "top1" in result.output


@pytest.mark.parametrize("student", [ENCODER, CONV], ids=["vit", "convvit"])
def test_another_size_and_number_of_classes_start_from_resampled_positions(
    colours: Path, tmp_path: Path, student: dict[str, Any]
) -> None:
    """From 64 px to 96 px: the grid grows from 4 × 4 to 6 × 6, and so does an evaluation's at 32 px."""
    torch.manual_seed(0)
    (tmp_path / "start").mkdir()
    save_weights(
        build_student(**student, decoder_dim=32, decoder_depth=1, decoder_heads=2, objective="mae"), tmp_path / "start"
    )
    keys = {"init": str(tmp_path / "start"), "image_size": 96, "max_steps": 2}
    finetune.run(finetune_config(colours, tmp_path / "out", **keys))
    model = load_model(resolve_checkpoint(tmp_path / "out"))
    assert isinstance(model, Classifier)
    assert (model.grid, model.head.out_features) == ((6, 6), 3)
    assert model.encoder.pos_embed.shape[1] == 36 + model.num_prefix_tokens
    small = finetune.evaluate(evaluation(colours, tmp_path / "out", image_size=32))
    assert 0 <= small["top1"] <= 1


def test_the_size_is_the_students_unless_said(colours: Path, student_run: Path, tmp_path: Path) -> None:
    finetune.run(finetune_config(colours, tmp_path / "out", init=str(student_run), image_size=None, max_steps=1))
    assert load_model(resolve_checkpoint(tmp_path / "out")).encoder.image_size == (64, 64)


def test_one_folder_of_train_and_val(colours: Path, tmp_path: Path) -> None:
    data = {"path": str(colours), "workers": 0}
    facts = finetune.run(finetune_config(colours, tmp_path / "out", student=ENCODER, data=data, val=None, max_steps=1))
    assert 0 <= facts["top1"] <= 1


def test_tars_train_and_evaluate_by_number(colours: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for file in sorted((colours / split).glob("*/*.png")):
                label = str(("blue", "green", "red").index(file.parent.name)).encode()
                for name, content in ((file.name, file.read_bytes()), (f"{file.stem}.cls", label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    data, val = ({"path": str(tmp_path / f"{split}.tar"), "workers": 0} for split in ("train", "val"))
    facts = finetune.run(finetune_config(colours, tmp_path / "out", student=ENCODER, data=data, val=val, eval_every=10))
    assert facts["top1"] > 0.9
    assert finetune.evaluate(evaluation(colours, tmp_path / "out"))["top1"] == facts["top1"]  # sorted names: same order


def test_a_public_classifier_file_is_evaluated_by_its_head(
    colours: Path, classifiers: list[Path], tmp_path: Path
) -> None:
    state = load_file(resolve_checkpoint(classifiers[0]) / "model.safetensors")
    save_file(state, tmp_path / "public.safetensors")
    known = finetune.evaluate(evaluation(colours, classifiers[0]))
    assert finetune.evaluate(evaluation(colours, tmp_path / "public.safetensors", student=ENCODER)) == known
    with pytest.raises(ConfigError, match="doesn't say what it is"):
        finetune.evaluate(evaluation(colours, tmp_path / "public.safetensors"))
    with pytest.raises(CheckpointError, match="don't fit this model"):
        finetune.evaluate(evaluation(colours, tmp_path / "public.safetensors", student=CONV))


def test_what_evaluation_refuses(
    colours: Path, classifiers: list[Path], student_run: Path, image_tree: Path, tmp_path: Path
) -> None:
    two = {"path": str(tmp_path / "two"), "workers": 0}
    for name in ("red", "green"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(colours / "train" / name)
    finetune.run(finetune_config(colours, tmp_path / "out", student=ENCODER, data=two, val=two, max_steps=1))
    cases: list[tuple[EvaluateConfig, type[Exception], str]] = [
        (evaluation(colours, student_run), CheckpointError, "holds no classifier but a pre-trained student"),
        (evaluation(colours, Path("/absent")), CheckpointError, "/absent does not exist"),
        (evaluation(colours, tmp_path / "out"), DataError, "different classes than init=.*: it lacks blue"),
        (evaluation(colours, classifiers[0], val={"path": str(image_tree)}), DataError, "it lacks class0"),
        (evaluation(colours, classifiers[0], val={"path": "/absent"}), DataError, "val.path: no such file"),
    ]
    for config, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            finetune.evaluate(config)
        assert "\n" not in str(caught.value)


def test_sizes_of_an_ensemble_must_agree(colours: Path, classifiers: list[Path], tmp_path: Path) -> None:
    finetune.run(
        finetune_config(colours, tmp_path / "out", student={**ENCODER, "image_size": 32}, image_size=32, max_steps=1)
    )
    with pytest.raises(ConfigError, match="set image_size"):
        finetune.evaluate(evaluation(colours, classifiers[0], tmp_path / "out"))
    assert "each" in finetune.evaluate(evaluation(colours, classifiers[0], tmp_path / "out", image_size=64))
