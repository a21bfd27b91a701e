"""Modules of a user's own as teachers."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.teachers import ModuleEntry, Teacher, TeacherOutput, build_teacher, registry


class Means(nn.Module):
    """4x4 tokens of three channels, by a weight; the parts and shapes of its output can be spoiled."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0))
        self.parts = parts

    def forward(self, pixels: Tensor) -> TeacherOutput:
        tokens = self.weight * nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).mT
        output = TeacherOutput(tokens, tokens.square().sum(-1), summary=tokens.mean(1, keepdim=True))
        return output._replace(**{name: part(output) for name, part in self.parts.items()})


def build(monkeypatch: pytest.MonkeyPatch, model: Any, image_size: int | None = None, **options: Any) -> Teacher:
    entry = ModuleEntry(lambda weights: model() if isinstance(model, type) else model, "7", image_size=64, grid=(4, 4))
    monkeypatch.setitem(registry.TEACHERS, "means", entry)
    return build_teacher("means", image_size=image_size, **options)


def test_its_outputs_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Means()
    teacher = build(monkeypatch, model)
    views = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    output, expected = teacher(views), model(teacher.prepare(views))
    torch.testing.assert_close(output.tokens, expected.tokens)
    torch.testing.assert_close(output.summary, expected.summary)
    torch.testing.assert_close(output.attention, expected.attention / expected.attention.sum(1, keepdim=True))
    assert (teacher.grid, teacher.dim, teacher.has_attention, teacher.has_summary) == ((4, 4), 3, True, True)
    bare = build(monkeypatch, Means(attention=lambda output: None, summary=lambda output: None))
    assert (bare.has_attention, bare.has_summary) == (False, False)
    torch.testing.assert_close(bare(views).tokens, output.tokens)


def test_its_identity_has_class_version_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    first, model = build(monkeypatch, Means()).identity(), Means()
    assert first["libraries"] == {"torch": str(torch.__version__), f"{__name__}.Means": "7"}
    assert first["weights"] == f"own/{__name__}.Means"
    assert build(monkeypatch, Means(), weights="~/folder/of.pt").identity()["weights"] == "of.pt"
    model.weight.data.fill_(3)
    assert build(monkeypatch, model).identity()["weights_sha256"] != first["weights_sha256"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"tokens": lambda output: output.tokens[:, 1:]},
            "gives tokens [1, 15, 3] of one view, where its entry says [1, 16",
        ),
        (
            {"attention": lambda output: output.tokens},
            "gives attention [1, 16, 3] of one view, where its entry says [1, 16]",
        ),
        (
            {"summary": lambda output: output.tokens[:, 0]},
            "gives summary [1, 3] of one view, where its entry says [1, 1, 3]",
        ),
        ({"tokens": lambda output: 1 / 0}, "can't be run (ZeroDivisionError: division by zero): mend its plug-in"),
    ],
)
def test_what_an_entry_doesnt_say_is_refused(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=re.escape(message)):
        build(monkeypatch, Means(**parts))


def test_what_it_hasnt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TeacherError, match="has image_size=64, not 32: leave it out"):
        build(monkeypatch, Means(), image_size=32)
    with pytest.raises(TeacherError, match="has no projection"):
        build(monkeypatch, Means(), tokens="projected")
    with pytest.raises(TeacherError, match=r"choose 1\.\.1"):
        build(monkeypatch, Means(), layers=2)
    monkeypatch.setitem(registry.TEACHERS, "means", ModuleEntry(lambda weights: Means(), "7", 64, (4, 4)))
    with pytest.raises(TeacherError, match=r"unknown teacher 'nothing'.*\(plug-ins have registered means\)"):
        build_teacher("nothing")
