"""The real thing, small: a real ViT-Ti/16 over real photographs."""

from pathlib import Path

from stages import extract_teacher_features, verify_cache
from stages.extract_teacher_features import ExtractConfig

WEIGHTS = "teachers/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


def test_int8_is_faithful_to_real_tokens(real_data: Path, tmp_path: Path) -> None:
    config = ExtractConfig.model_validate(
        {
            "data": {"path": str(real_data / "imagenette224/train-*.tar"), "limit": 500, "workers": 1},
            "teacher": {"spec": "timm:vit_tiny_patch16_224", "weights": str(real_data / WEIGHTS)},
            "cache": {"path": str(tmp_path / "cache"), "samples_per_shard": 256},
        }
    )
    facts = extract_teacher_features.run(config)
    assert facts["tokens"] == 500 * 196
    assert facts["cosine_mean"] >= 0.9995
    assert facts["nmse_worst"] <= 1e-4
    options = {"path": tmp_path / "cache", "level": "deep", "samples": 8, "weights": str(real_data / WEIGHTS)}
    assert verify_cache.run(verify_cache.VerifyConfig.model_validate(options)).sound
