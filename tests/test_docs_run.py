"""Every command in the code blocks of README.md and docs/ is run, in its document's order, on small images and sizes.

A document's shell blocks are executed by bash, with stand-ins for the programs that note how they were called: so
quoting, variables, continued lines and arithmetic are a shell's. Then the calls run here, one after the other, so that
each finds what the ones before it have left. What makes them small is in the tables below, and nowhere else: a new
command in a document is run without a line here, as long as a row of SMALL fits it.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
from click.testing import CliRunner
from safetensors.torch import save_file

import cli
from pipeline.teachers.registry import TEACHERS, Entry
from tests.coco import write_coco
from tests.pictures import smooth_picture
from tests.servers import s3_server
from tests.test_docs import DOCUMENTS, LAUNCHERS, ROOT, calls_in, code_blocks, launched

STUDENT = "student.dim=48 student.num_heads=3"
DECODER = "student.decoder_dim=32 student.decoder_depth=1 student.decoder_heads=2"
# A call that fits gets these words too; the last word of a key counts.
SMALL = [
    (r"cache\.quantiser=codes .*cache\.clusters=", "cache.clusters=8"),
    (
        r"^mrmae (extract-teacher-features|pretrain|finetune|knn|linear-probe|detect) (?!.*(--eval|images=))",
        "data.workers=0",
    ),
    (r"^mrmae (embed|predict|segment) (?!.* images=)", "data.workers=0"),
    (r" segment (?!.*--eval)", "batch_size=4 max_steps=2"),
    (r" segment .*--eval", "pictures=2"),
    (r" (finetune|knn|linear-probe) .*(--config|val\.(path|share)=)", "val.workers=0"),
    (r" (teachers\.\w+|teacher)\.spec=", r"\1.weights=random \1.image_size=32"),  # no hub, and 2 x 2 patches
    (r" extract-teacher-features ", "views.image_size=32 batch_size=16"),
    (r" extract-teacher-features .*--config", "teacher.image_size=32"),
    (r" extract-teacher-features .*--config configs/imagenet\.yaml", "teacher.weights=random"),
    (r" --shard-range ", "--shard-range 0:1"),
    (r" pretrain ", f"student.image_size=32 student.depth=4 {STUDENT} {DECODER}"),
    (r" pretrain .*init=timm:", "init=null"),  # no hub
    (
        r" pretrain .*student\.name=timm:resnet18",
        "student.name=timm:test_resnet student.depth=null student.dim=null student.num_heads=null",
    ),
    (r"^mrmae pretrain ", "views.image_size=32"),
    (r"^mrmae (pretrain|finetune|detect) (?!.*--eval)", "batch_size=8 max_steps=2"),
    (r" (finetune|knn) .*student\.name=", f"student.image_size=32 student.depth=4 {STUDENT}"),
    (r" finetune .*--config", "image_size=32"),
    (r" knn .*init=null '?teacher=", "data.limit=8 val.limit=8"),
    (r" linear-probe ", "epochs=2"),
    (r" detect ", "image_size=64 detector.window=2 detector.channels=16 detector.rois=16"),
    (r" detect (?!.*--eval)", "batch_size=2"),
    (r" detect .*pictures=", "pictures=2"),
    (r" detect .*--config configs/coco\.yaml", f"student.image_size=32 student.depth=4 {STUDENT}"),
    (r" benchmark student ", "batch_size=1 image_size=32 rounds=1 compile=false peak_memory=false"),
    (r" benchmark student ", "students=[mrmae_vit_tiny_patch16,mrmae_convvit_small_patch16]"),
    (r" benchmark pretrain ", "images=16 batch_size=4 rounds=3 workers=0 compile=false"),
    (r" benchmark pretrain ", 'teachers=[{"spec":"dino_vits16","weights":"random","image_size":32}]'),
    (r" benchmark detector ", "image_size=64 rounds=0 students=[mrmae_vit_tiny_patch16]"),
]
# What is written so in the documents is read so here.
READ_AS = [(r"(?<![\w.])/data/", "data/"), (r"/usr/bin/time -v ", "")]
# Variables that a cluster sets.
ENVIRONMENT = {
    "RANK": "0",
    "HOST": "localhost",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
}
_CACHE = "mrmae extract-teacher-features data.path=/data/photos teacher.spec=dino_vits16 cache.path=/data/photos_dino"
_CONVVIT = (
    "mrmae pretrain data.path=/data/photos mimic.objective=mae mask.focus=random"
    " student.name=mrmae_convvit_base_patch16 output=runs/imagenet_clip_convvit_base"
)
# What a reader has by the time of a document.
BEFORE = {
    "downstream.md": f"""{_CACHE}
mrmae pretrain data.path=/data/photos cache.path=/data/photos_dino output=runs/photos
mrmae finetune init=runs/photos data.path=/data/flowers output=runs/clip_flowers
mrmae finetune init=runs/photos data.path=/data/flowers output=runs/dino_flowers seed=1
""",
    "pretraining.md": f"""{_CACHE}
export IMAGENET=/data/imagenet
mrmae extract-teacher-features --config configs/imagenet.yaml
""",
    "detection.md": f"{_CONVVIT}\n",
    "students.md": _CACHE.replace("photos_dino", "photos_cache"),
}
# Calls that are not run here: why, and the test that runs them.
ELSEWHERE = {
    r"make (demo|test|test-slow|test-gpu|test-lowest|check|keys)": (
        "installs into .venv; demo is run, the others are pytest, ruff, mypy and `mrmae --keys`",
        "tests/test_stages/test_demo.py::test_the_demo_leaves_a_table_and_pictures",
    ),
    r"(sbatch|srun|scontrol|head) .*": (
        "a cluster's own; the scripts that they start are blocks of the same document",
        "tests/test_docs_run.py::test_shown_commands_run",
    ),
    r"mrmae ablate --config configs/ablation_imagenette\.yaml.*": (
        "many variants, each in processes of its own; a tiny twin is run",
        "tests/test_configs.py::test_the_tiny_ablation",
    ),
    r"mrmae pretrain --config configs/ablation_imagenette\.yaml .*timm:.*": (
        "a student of timm at its own size; micro ones are run",
        "tests/test_stages/test_timm_students.py::test_a_domain_is_continued_from_public_weights",
    ),
    r"mrmae ablate --config configs/two_teachers_imagenette\.yaml.*": (
        "many variants, each in processes of its own; a tiny twin is run",
        "tests/test_configs.py::test_the_tiny_pair_of_teachers",
    ),
    r"mrmae (finetune --eval .* combine=greedy .*|export init=runs/abc/soup .*)": (
        "several fine-tunings of one start",
        "tests/test_stages/test_soup.py::test_a_greedy_soup_is_chosen_by_the_images_held_back",
    ),
    r"mrmae export .* push=OWNER/NAME .*": (
        "an upload",
        "tests/test_stages/test_export.py::test_what_is_pushed_is_loaded_by_timm_from_the_hub",
    ),
    r"mrmae pretrain --plugin mine\.py .*": (
        "code of a user's own",
        "tests/test_stages/test_plugins.py::test_an_objective_trains_three_steps_and_goes_on",
    ),
    r"mrmae bootstrap --config configs/ablation_imagenette\.yaml.*": (
        "pre-trainings in processes of their own; small ones are run",
        "tests/test_stages/test_bootstrap.py::test_each_student_teaches_the_next",
    ),
}
# What a document says that its commands leave.
LEFT = {
    "README.md": [
        "data/photos_dino/cache.json",
        "runs/photos/config.yaml",
        "runs/photos/metrics.jsonl",
        "runs/photos/visualize.png",
        "runs/photos/report.html",
        "caches/imagenet_clip_vitb16/shards/000000-00.tar",
        "runs/imagenet_clip_convvit_base/checkpoints",
        "runs/imagenet_clip_convvit_base_finetuned/checkpoints/best",
    ],
    "cluster.md": ["caches/imagenet_clip_vitb16/commits/000000.json", "runs/imagenet_clip_convvit_base/checkpoints"],
    "data.md": ["caches/photos/cache.json", "runs/photos/tensorboard", "runs/photos_finetuned/checkpoints/best"],
    "detection.md": [
        "runs/coco_clip_convvit_base/metrics.json",
        "runs/coco_clip_convvit_base/predictions.json",
        "runs/coco_clip_convvit_base/predictions.png",
        "runs/convvit_coco/checkpoints/best",
        "runs/convvit_coco/metrics.json",
        "runs/coco_tiny/predictions.png",
    ],
    "downstream.md": [
        "runs/flowers/checkpoints/best",
        "runs/photos/metrics.json",
        "runs/photos/features",
        "runs/photos/visualize.png",
        "runs/photos/visualize_attention.png",
        "flowers.html",
        "cat_and_dog.png",
        "photos.csv",
        "runs/photos_coco/checkpoints/best",
        "runs/photos_coco/metrics.json",
        "runs/photos_coco/predictions.png",
        "photos.safetensors",
        "tokens.npz",
        "runs/photos/report.html",
        "exports/photos/config.json",
        "exports/photos/model.onnx",
    ],
    "first-hour.md": [
        "caches/photos/cache.json",
        "runs/photos/metrics.json",
        "runs/photos_finetuned/checkpoints/best",
        "runs/report.html",
    ],
    "results.md": ["runs/imagenette/mae/metrics.jsonl", "runs/imagenette_128/mr_mae_finetuned_1/checkpoints/best"],
    "students.md": [
        "runs/photos_dinov3/checkpoints",
        "exports/photos_dinov3/config.json",
        "runs/flowers_resnet18/checkpoints/best",
        "exports/photos_resnet18/model.safetensors",
    ],
    "teachers.md": [
        "data/photos_caches/dino/cache.json",
        "data/photos_caches/clip/cache.json",
        "runs/both/checkpoints",
        "data/photos_layers/l12/cache.json",
        "runs/layers/visualize.png",
    ],
}
WITH_CALLS = [file for file in DOCUMENTS if any(code_blocks(file, "sh"))]


class Call(NamedTuple):
    """A program as the shell called it, and the variables that the document had exported by then."""

    words: list[str]
    exported: dict[str, str]


@pytest.mark.parametrize("document", WITH_CALLS, ids=lambda file: file.name)
def test_shown_commands_run(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The names of teachers, for small networks that are built in no time; test_timm_vit.py builds the real ones.
    for name, small in (("dino_vitb16", "test_vit3"), ("dino_vits16", "test_vit"), ("clip_vitb16", "test_vit")):
        monkeypatch.setitem(TEACHERS, name, Entry(f"timm:{small}", 224, "small"))
    text = "\n".join([BEFORE.get(document.name, ""), *map(as_script, code_blocks(document, "sh"))])
    calls = called(text, folder)
    monkeypatch.chdir(folder)
    run_here = [call for call in calls if not elsewhere(call)]
    listed = [line for line in calls_in(text) if any(re.search(pattern, line) for pattern in ELSEWHERE)]
    assert len(run_here) == len(calls_in(text)) - len(listed), [call.words for call in calls]
    with s3_server() if "s3://" in "".join(calls_in(text)) else nullcontext():
        for call in run_here:
            for name, value in call.exported.items():
                monkeypatch.setenv(name, value)
            words = made_small(call)
            result = CliRunner().invoke(cli.main, words)
            output = f"{result.output}{result.exception!r}"
            assert result.exit_code == 0, f"{document.name}: {shlex.join(call.words)}\n{output}"
    for left in LEFT.get(document.name, []):
        assert (folder / left).exists(), f"{document.name} promises {left}"


def as_script(block: str) -> str:
    """A block that is a file of its own runs in a shell of its own: it may end by `exit` or `exec`."""
    return f"(\n{block}\n)" if block.startswith("#!") else block


def called(text: str, folder: Path) -> list[Call]:
    """What bash calls when it runs the text, in this order; nothing that it calls is really run."""
    for pattern, replacement in READ_AS:
        text = re.sub(pattern, replacement, text)
    programs, log = folder.parent / "programs", folder.parent / "calls.jsonl"
    programs.mkdir()
    noting = programs / "note"
    noting.write_text(
        f"#!{sys.executable} -IS\nimport json, os, sys\n"
        "words = sys.argv[1:] if sys.argv[0].endswith('/note') else [os.path.basename(sys.argv[0]), *sys.argv[1:]]\n"
        f"print(json.dumps([words, dict(os.environ)]), file=open({str(log)!r}, 'a'))\n"
    )
    noting.chmod(0o755)
    for name in ("mrmae", *LAUNCHERS):  # what `exec` starts has to be a file
        (programs / name).symlink_to(noting)
    bash = shutil.which("bash")
    assert bash is not None
    script = 'command_not_found_handle() { note "$@"; }\n' + text
    done = subprocess.run(
        [bash, "-eu", "-c", script],
        cwd=folder,
        env={**ENVIRONMENT, "PATH": str(programs)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^export (\w+)=", text, flags=re.MULTILINE)
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    return [Call(words, {name: env[name] for name in names if name in env}) for words, env in notes]


def elsewhere(call: Call) -> bool:
    return any(re.fullmatch(pattern, shlex.join(call.words)) for pattern in ELSEWHERE)


def made_small(call: Call) -> list[str]:
    """The words for mrmae: without a launcher, with what SMALL adds."""
    words = launched(call.words) if call.words[0] in LAUNCHERS else call.words[1:]
    line = " ".join(["mrmae", *words, ""])
    more = [word for pattern, row in SMALL for fit in re.finditer(pattern, line) for word in fit.expand(row).split()]
    # Once a key, as mrmae wants them, and the last word of a key counts.
    return list(
        {word.partition("=")[0] if "=" in word else (at, word): word for at, word in enumerate(words + more)}.values()
    )


def test_the_tables_have_no_row_that_nothing_needs() -> None:
    texts = {file.name: BEFORE.get(file.name, "") + "\n".join(code_blocks(file, "sh")) for file in WITH_CALLS}
    lines = [f"{line} " for text in texts.values() for line in text.replace("\\\n", " ").splitlines()]
    for pattern in [row[0] for row in SMALL + READ_AS] + list(ELSEWHERE):
        assert any(re.search(pattern, line) for line in lines), pattern
    assert {*BEFORE, *LEFT} <= set(texts)


@pytest.mark.parametrize("reason", ELSEWHERE.values(), ids=lambda reason: reason[1])
def test_what_is_run_elsewhere_is(reason: tuple[str, str]) -> None:
    file, _, name = reason[1].partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images wherever the documents have large ones, under two roots: /data and ../shared/data."""
    root = tmp_path_factory.mktemp("documents")
    for name, count in {
        "photos": 24,
        "imagenet/train": 24,
        "imagenet/val": 8,
        "flowers/train": 16,
        "flowers/val": 8,
    }.items():
        for number in range(count):
            file = root / "data" / name / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            smooth_picture(100 * len(name) + number, 50, 60).save(file)
    images, annotations = write_coco(root / "scenes")
    for split in ("train2017", "val2017"):
        for name in (f"data/coco/{split}", f"shared/data/coco128/images/{split}"):
            shutil.copytree(images, root / name)
        for name in ("data/coco/annotations", "shared/data/coco128"):
            (root / name).mkdir(exist_ok=True)
            shutil.copy(annotations, root / name / f"instances_{split}.json")
    for name, tars in (("train", 10), ("val", 4)):
        for number in range(tars):
            write_tar(root / f"shared/data/imagenette224/{name}-{number:05d}.tar", 4, seed=100 * number + tars)
    (root / "shared/data/imagenette224/classes.json").write_text('{"0": "n01440764", "1": "n02102040"}')
    weights = root / "shared/data/teachers/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    weights.parent.mkdir()
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
    return root


def write_tar(file: Path, count: int, seed: int) -> None:
    """A WebDataset tar of labelled pictures."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            picture, label = file.with_name("one.jpg"), file.with_name("one.cls")
            smooth_picture(seed + number, 50, 60).save(picture)
            label.write_text(str(number % 2))
            tar.add(picture, f"{file.stem}_{number}.jpg")
            tar.add(label, f"{file.stem}_{number}.cls")
            picture.unlink()
            label.unlink()


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A checkout as a reader has it: configs/, an environment to activate, and images where the documents have them."""
    checkout = tmp_path / "checkout"
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/activate").touch()
    (checkout / "configs").symlink_to(ROOT / "configs")
    (checkout / "data").mkdir()
    (tmp_path / "shared").symlink_to(data / "shared")
    for place in (data / "data").iterdir():
        (checkout / "data" / place.name).symlink_to(place)
    (checkout / "coco").symlink_to(data / "data/coco")
    (checkout / "labelled").symlink_to(data / "data/flowers")
    (checkout / "photos").symlink_to(data / "data/photos")
    for name in ("cat.jpg", "dog.jpg", "street.jpg"):
        smooth_picture(len(name), 50, 60).save(checkout / name)
    return checkout
