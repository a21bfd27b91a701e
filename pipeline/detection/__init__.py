"""Detection: COCO-format data, Mask R-CNN on a given encoder, average precision, pictures."""

from pipeline.configs.detection import CocoConfig, DetectorConfig, JitterConfig
from pipeline.detection.backbone import Backbone, Encoder
from pipeline.detection.coco import CocoImages, open_coco
from pipeline.detection.dataset import DetectionBatch, DetectionDataset, canvases
from pipeline.detection.detector import Detector
from pipeline.detection.pictures import annotated_scene, detected_scene, draw_scenes
from pipeline.detection.precision import as_results, average_precision
from pipeline.detection.semantic import semantic_labels

__all__ = [
    "Backbone",
    "CocoConfig",
    "CocoImages",
    "DetectionBatch",
    "DetectionDataset",
    "Detector",
    "DetectorConfig",
    "Encoder",
    "JitterConfig",
    "annotated_scene",
    "as_results",
    "average_precision",
    "canvases",
    "detected_scene",
    "draw_scenes",
    "open_coco",
    "semantic_labels",
]
