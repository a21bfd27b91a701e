import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.models import OBJECTIVES, Student, build_student, load_weights
from pipeline.models.masking import complement, gather_tokens, visible_map
from pipeline.models.patches import patchify
from tests.micro import NAMES, assert_overfits

Build = Callable[..., Student]
Draw = Callable[..., Any]
CELLS = 4  # of 16, that a step predicts at the default share


def drawn(student: Student, batch: Draw, size: int = 3) -> list[Any]:
    """The arguments of `forward`, with four of the masked cells to predict, in no order."""
    images, ids_keep, targets = batch(student, size)
    order = torch.rand(size, 11).argsort(1)[:, :CELLS]
    ids_predict = complement(ids_keep, 16).gather(1, order) if student.decoder else None
    if student.target_rows == "masked":
        targets = {teacher: target[:, :CELLS] for teacher, target in targets.items()}
    return [images, ids_keep, targets, ids_predict]


def written_out(student: Student, images: Tensor, ids_keep: Tensor, cells: Tensor) -> Tensor:
    """The pixel loss, sample by sample and head by head, in float64."""
    decoder, width = student.decoder, 32 // 2
    losses = []
    latents = student.encoder(images, ids_keep).latent
    for image, visible, predicted, latent in zip(images, ids_keep, cells, latents, strict=True):
        prefix = student.encoder.num_prefix_tokens
        position = decoder.decoder_pos_embed[0]
        places = [*range(prefix), *(prefix + int(cell) for cell in visible)]
        memory = decoder.decoder_embed(latent) + torch.stack([position[place] for place in places])
        x = torch.stack([decoder.mask_token[0, 0] + position[prefix + int(cell)] for cell in predicted])
        for block in decoder.decoder_cross_blocks:
            normed = block.norm1(x)
            query, key = block.attn.q(normed), F.linear(memory, *halves(block.attn.kv, 0))
            value, mixed = F.linear(memory, *halves(block.attn.kv, 1)), []
            for head in (slice(0, width), slice(width, 2 * width)):
                weights = (query[:, head] @ key[:, head].T / width**0.5).softmax(1)
                mixed.append(weights @ value[:, head])
            x = x + block.attn.proj(torch.cat(mixed, 1))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        pred = decoder.decoder_pred(decoder.decoder_norm(x))
        true = patchify(image[None], 8)[0, predicted]
        true = (true - true.mean(1, keepdim=True)) / (true.var(1, keepdim=True) + 1e-6).sqrt()
        losses.append((pred - true).square().mean())
    return torch.stack(losses).mean()


def halves(linear: nn.Linear, half: int) -> tuple[Tensor, Tensor]:
    return linear.weight.chunk(2)[half], linear.bias.chunk(2)[half]


@pytest.mark.parametrize("share", [None, 1.0])
def test_cross_is_the_written_out_computation(micro: Build, batch: Draw, kind: str, share: float | None) -> None:
    student = micro(kind, objective="mae", decoder="cross", predict_share=share)
    images, ids_keep, _, ids_predict = drawn(student, batch)
    cells = complement(ids_keep, 16) if share else ids_predict
    parameters = {name: value for name, value in student.named_parameters() if value.requires_grad}
    found = student(images, ids_keep, None, None if share else ids_predict)["pixel_loss"]
    gradients = torch.autograd.grad(found, list(parameters.values()))
    student.double()
    expected = written_out(student, images.double(), ids_keep, cells)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    parameters = {name: value for name, value in student.named_parameters() if value.requires_grad}
    exact = torch.autograd.grad(expected, list(parameters.values()))
    for name, gradient, reference in zip(parameters, gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_no_masked_pixel_reaches_a_prediction(micro: Build, batch: Draw, kind: str, decoder: str) -> None:
    student = micro(kind, decoder=decoder)
    images, ids_keep, targets, ids_predict = drawn(student, batch)
    visible = visible_map(ids_keep, student.grid, 8)
    other = torch.where(visible == 1, images, torch.randn_like(images) * 50)
    before, after = (student(pixels, ids_keep, targets, ids_predict) for pixels in (images, other))
    assert torch.equal(before["pred"], after["pred"])
    assert torch.equal(before["mimic_loss"], after["mimic_loss"])
    assert not torch.equal(before["pixel_loss"], after["pixel_loss"])


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_a_share_is_predicted_as_all_cells_would_be(micro: Build, batch: Draw, kind: str, decoder: str) -> None:
    """Of the full decoder: its last block leaves out what isn't asked for, and nothing else changes."""
    student = micro(kind, objective="mae", decoder=decoder)
    images, ids_keep, _, ids_predict = drawn(student, batch)
    latent = student.encoder(images, ids_keep).latent.detach()
    some = student.decoder(latent, ids_keep, ids_predict)
    of_all = gather_tokens(student.decoder(latent, ids_keep), ids_predict)
    torch.testing.assert_close(some, of_all)
    direction = torch.randn_like(some)
    parameters = [value for name, value in student.decoder.named_parameters() if "pred" not in name]
    parameters = [value for value in parameters if value.requires_grad]
    for gradient, reference in zip(
        *(torch.autograd.grad(tokens, parameters, direction) for tokens in (some, of_all)), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_takes_part_and_checkpointing_changes_no_number(
    micro: Build, batch: Draw, kind: str, objective: str
) -> None:
    plain = micro(kind, objective=objective, decoder="cross")
    frugal = micro(kind, objective=objective, decoder="cross", gradient_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    inputs = drawn(plain, batch)
    for student in (plain, frugal):
        student(*inputs)["loss"].backward()
    for (name, parameter), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(other.grad, parameter.grad, msg=name)


@pytest.mark.parametrize("objective", ["mr_mae", "mae", "feature_encoder", "joint_decoder"])
def test_cross_overfits_eight_images(micro: Build, batch: Draw, kind: str, objective: str) -> None:
    depth: Any = 2 if kind == "vit" else (1, 1, 2)
    student = micro(kind, objective=objective, depth=depth, decoder="cross", decoder_depth=1, mimic_weight=1.0)
    _, *inputs = drawn(student, batch, size=8)
    assert_overfits(student, *inputs)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_a_step_of_a_share_compiles_without_a_graph_break(
    micro: Build, batch: Draw, decoder: str, gradient_checkpointing: bool
) -> None:
    options = {"depth": 1, "decoder_depth": 1, "gradient_checkpointing": gradient_checkpointing}
    student = micro("vit", decoder=decoder, **options)
    inputs = drawn(student, batch)
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")(*inputs)
    compiled["loss"].backward()
    for name, value in student(*inputs).items():
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.parametrize(("before", "after"), [("full", "cross"), ("cross", "full")])
def test_one_decoders_checkpoint_starts_a_student_with_the_other(
    micro: Build, kind: str, before: str, after: str
) -> None:
    former, student = micro(kind, decoder=before), micro(kind, decoder=after)
    report = load_weights(student, former.state_dict(), strict=False)
    for name, value in former.encoder.state_dict().items():
        assert torch.equal(student.encoder.state_dict()[name], value)
    blocks = {"full": "decoder_blocks", "cross": "decoder_cross_blocks"}
    assert {name.partition(".")[0] for name in report.fresh} == {blocks[after]}
    assert {name.partition(".")[0] for name in report.dropped} == {blocks[before]}


def test_a_student_that_only_mimics_has_no_decoder_and_leaves_what_is_for_it(
    micro: Build, batch: Draw, kind: str
) -> None:
    student = micro(kind, objective="feature_encoder")
    assert not any(name.startswith(("decoder", "mask_token")) for name in student.state_dict())
    assert student.encoder.state_dict().keys() == micro(kind).encoder.state_dict().keys()
    twin = micro(kind)
    load_weights(twin, student.state_dict(), strict=False)
    images, ids_keep, targets = batch(student)
    same = twin(images, ids_keep, targets)["mimic_loss"]
    torch.testing.assert_close(student(images, ids_keep, targets)["mimic_loss"], same)


def test_a_spec_names_the_decoder_only_where_it_is_another_than_before() -> None:
    """Runs from before there was a choice are recognised by their spec."""
    options: dict[str, Any] = {"objective": "mae", "image_size": 32, "patch_size": 8}
    assert not {"decoder", "predict_share"} & build_student(NAMES["vit"], **options).spec.keys()
    student = build_student(NAMES["vit"], decoder="cross", predict_share=0.5, **options)
    again = build_student(**json.loads(json.dumps(student.spec)))
    assert (again.spec, again.predict_share) == (student.spec, 0.5)
    assert again.state_dict().keys() == student.state_dict().keys()
    assert build_student(NAMES["vit"], decoder="cross", **options).predict_share == 0.25


def test_unknown_decoders_and_shares_are_refused(micro: Build) -> None:
    with pytest.raises(ConfigError, match="decoder='crosses' is unknown"):
        micro("vit", decoder="crosses")
    with pytest.raises(ConfigError, match=r"predict_share=0: give a share above 0, up to 1"):
        micro("vit", predict_share=0)
