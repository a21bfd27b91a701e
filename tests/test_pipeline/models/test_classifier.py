from typing import Any

import pytest
import torch

from pipeline.models import build_classifier, layer_ids
from pipeline.models.classifier import Classifier
from tests.micro import NAMES


@pytest.fixture(params=[("vit", "mean"), ("vit", "cls"), ("convvit", "mean")], ids="-".join)
def classifier(request: pytest.FixtureRequest, encoder_sizes: dict[str, Any]) -> Classifier:
    kind, pool = request.param
    model = build_classifier(NAMES[kind], 7, pool=pool, **encoder_sizes)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_logits_are_the_head_on_pooled_tokens(classifier: Classifier) -> None:
    images = torch.randn(2, 3, 32, 32)
    x, _ = classifier.encoder.forward_blocks(images)
    patches = x[:, classifier.num_prefix_tokens :]
    if classifier.pool == "mean":
        pooled, tokens = classifier.fc_norm(patches.mean(1)), classifier.fc_norm(patches)
    else:
        pooled, tokens = classifier.encoder.norm(x[:, 0]), classifier.encoder.norm(patches)
    torch.testing.assert_close(classifier(images), classifier.head(pooled))
    torch.testing.assert_close(classifier.forward_tokens(images), tokens)
    assert classifier.attention_query == classifier.pool
    assert (classifier.dim, classifier.grid, classifier.image_size) == (48, (4, 4), (32, 32))


def test_every_parameter_is_trained_positions_too(classifier: Classifier) -> None:
    classifier(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_names_are_the_references(classifier: Classifier) -> None:
    names = {name.partition(".")[0] for name in classifier.state_dict()}
    norm = {"fc_norm"} if classifier.pool == "mean" else {"norm"}
    if classifier.num_prefix_tokens:
        assert names == {"cls_token", "pos_embed", "patch_embed", "blocks", "head"} | norm
    else:
        stages = {f"patch_embed{i}" for i in (1, 2, 3, 4)} | {f"blocks{i}" for i in (1, 2, 3)}
        assert names == {"pos_embed", "head"} | stages | norm


def test_layers_count_from_the_embeddings_to_the_head(classifier: Classifier) -> None:
    ids, last = layer_ids(classifier)
    assert last == 3 + 1
    assert ids.keys() == dict(classifier.named_parameters()).keys()
    blocks = "blocks" if classifier.num_prefix_tokens else "blocks3"
    for name, layer in ids.items():
        part, *rest = name.removeprefix("encoder.").split(".")
        if part == blocks:
            assert layer == int(rest[0]) + 1
        elif part in ("head", "fc_norm", "norm"):
            assert layer == last
        else:
            assert layer == 0
