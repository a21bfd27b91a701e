"""Semantic segmentation by a linear head on patch tokens that it is handed."""

from pipeline.segmentation.dataset import SceneBatch, SceneCrops, SceneWindows, WindowBatch
from pipeline.segmentation.head import SegmentationHead, label_scene, segmentation_loss
from pipeline.segmentation.scenes import FolderScenes, LabelCode, Scenes, decode_scene
from pipeline.segmentation.scoring import class_scores, colour_labels, mean_scores

__all__ = [
    "FolderScenes",
    "LabelCode",
    "SceneBatch",
    "SceneCrops",
    "SceneWindows",
    "Scenes",
    "SegmentationHead",
    "WindowBatch",
    "class_scores",
    "colour_labels",
    "decode_scene",
    "label_scene",
    "mean_scores",
    "segmentation_loss",
]
