"""Detection: COCO-format data, Mask R-CNN on an encoder that it is handed, average precision, pictures."""

from pipeline.detection.backbone import Backbone, Encoder
from pipeline.detection.coco import CocoConfig, CocoImages, open_coco
from pipeline.detection.dataset import DetectionBatch, DetectionDataset, canvases
from pipeline.detection.detector import Detector, DetectorConfig
from pipeline.detection.pictures import annotated_scene, detected_scene, draw_scenes
from pipeline.detection.placement import JitterConfig
from pipeline.detection.precision import as_results, average_precision

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
]
