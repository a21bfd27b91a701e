"""The real thing, small: a real ViT-Ti/16 over real photographs."""

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from pipeline.cache import open_cache
from pipeline.data.images import open_images
from stages import extract_teacher_features, verify_cache
from stages.extract_teacher_features import ExtractConfig

WEIGHTS = "teachers/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
PHOTOS, TRAIN = 240, 160


def test_int8_is_faithful_to_real_tokens_and_they_tell_photos_apart(real_data: Path, tmp_path: Path) -> None:
    """Fidelity, deep verification, and a linear classifier of cached mean tokens: random weights reach 0.3."""
    path = str(real_data / "imagenette224/train-*.tar")
    config = ExtractConfig.model_validate(
        {
            "data": {"path": path, "limit": PHOTOS, "workers": 1},
            "teacher": {"spec": "timm:vit_tiny_patch16_224", "weights": str(real_data / WEIGHTS)},
            "views": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0},  # the whole photo
            "cache": {"path": str(tmp_path / "cache"), "samples_per_shard": 128, "calibration": 64, "summary": True},
        }
    )
    facts = extract_teacher_features.run(config)
    assert facts["tokens"] == PHOTOS * 196
    assert facts["cosine_mean"] >= 0.9995
    assert facts["nmse_worst"] <= 1e-4
    assert facts["summary"]["cosine_mean"] >= facts["cosine_mean"]  # by statistics of its own
    assert facts["summary"]["nmse_worst"] <= 1e-3
    options = {"path": tmp_path / "cache", "level": "deep", "samples": 8, "weights": str(real_data / WEIGHTS)}
    assert verify_cache.run(verify_cache.VerifyConfig.model_validate(options)).sound

    reader, labels = open_cache(tmp_path / "cache"), open_images(path, PHOTOS).labels
    means = np.stack([reader.read(index, 0, dequantise=True).tokens.mean(0) for index in range(PHOTOS)])
    features = means / np.linalg.norm(means, axis=1, keepdims=True)
    classifier = LogisticRegression(C=100, max_iter=1000).fit(features[:TRAIN], labels[:TRAIN])
    assert classifier.score(features[TRAIN:], labels[TRAIN:]) >= 0.85
