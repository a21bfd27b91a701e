import pytest
import torch
from torch import nn

from pipeline.training.grad_norms import GradNorms


def test_norms_are_those_of_each_loss_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    head = nn.Linear(3, 1)

    def losses() -> dict[str, torch.Tensor]:
        hidden = model(x)
        return {"a": hidden.square().mean(), "b": 3 * head(hidden).mean(), "loss": hidden.sum()}

    norms = GradNorms(("a", "b", "absent"), list(model.parameters()), every=5).measure(losses)
    assert set(norms) == {"grad_norm/a", "grad_norm/b"}
    for part in ("a", "b"):
        model.zero_grad()
        losses()[part].backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        assert float(norms[f"grad_norm/{part}"]) == pytest.approx(float(expected), rel=1e-6)


def test_when() -> None:
    assert [step for step in range(10) if GradNorms((), [], every=4).due(step)] == [0, 4, 8]
    assert not GradNorms((), [], every=0).due(0)
