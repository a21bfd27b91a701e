"""knn and linear-probe end to end: what they report is what scikit-learn finds on the features that they kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from pipeline.data.images import open_images
from stages import knn, linear_probe


def test_both_agree_with_scikit_learn_on_real_features(real_data: Path, tmp_path: Path) -> None:
    """Imagenette photos through the real ViT-Ti teacher: 160 to learn from, 80 to measure on."""
    sets: dict[str, Any] = {
        "data": {"path": str(real_data / "imagenette224/train-{00000..00001}.tar"), "limit": 160, "workers": 1},
        "val": {"path": str(real_data / "imagenette224/val-00000.tar"), "limit": 80, "workers": 1},
    }
    weights = real_data / "teachers/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    teacher = {"spec": "timm:vit_tiny_patch16_224", "weights": str(weights), "image_size": 128}
    keys = {**sets, "teacher": teacher, "crop": 1.0, "output": str(tmp_path)}
    near = knn.run(knn.KnnConfig.model_validate({**keys, "k": 10}))
    rates = {"batch_size": 32, "blrs": [1.0, 3.0, 10.0, 30.0, 100.0]}
    probe = linear_probe.run(linear_probe.LinearProbeConfig.model_validate({**keys, **rates}))

    kept = [load_file(file)["features"] for file in (tmp_path / "features").iterdir()]
    train_x, val_x = sorted(kept, key=len, reverse=True)
    train_y, val_y = (open_images(entry["path"], entry["limit"]).labels for entry in sets.values())
    votes = KNeighborsClassifier(10, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    assert near["top1"] == pytest.approx(votes.fit(train_x, train_y).score(val_x, val_y), abs=1e-9)
    assert near["top1"] > 0.6  # the real teacher tells photos apart

    scaler = StandardScaler().fit(train_x)
    regression = LogisticRegression(C=0.1, max_iter=3000).fit(scaler.transform(train_x), train_y)
    assert probe["top1"] == pytest.approx(regression.score(scaler.transform(val_x), val_y), abs=4 / 80)
