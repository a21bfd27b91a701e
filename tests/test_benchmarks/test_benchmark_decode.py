from pathlib import Path

from benchmarks.configs.decode import BenchmarkDecodeConfig
from benchmarks.decode import run


def test_every_decoder_is_timed_and_compared(image_tree: Path) -> None:
    figures = run(BenchmarkDecodeConfig.model_validate({"data": {"path": str(image_tree)}, "images": 6, "rounds": 2}))
    assert figures["jpegs"] == 6
    assert set(figures["decoders"]) == {"pillow", "simplejpeg", "torchvision", "ours"}
    for decoder in figures["decoders"].values():
        assert decoder["same_pixels"] == 6
        low, high = decoder["range"]
        assert 0 < low <= decoder["over_pillow"] <= high
