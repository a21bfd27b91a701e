"""Teachers: frozen CLIP and DINO ViTs that turn views into patch tokens and an attention row to focus by."""

from pipeline.teachers.mrmae import PatchEncoder
from pipeline.teachers.registry import TEACHERS, Entry, TeacherRow, build_teacher, list_teachers
from pipeline.teachers.teacher import (
    Backbone,
    Teacher,
    TeacherOutput,
    TokenChoice,
    look_together,
    resize_views,
    share_backbones,
)

__all__ = [
    "TEACHERS",
    "Backbone",
    "Entry",
    "PatchEncoder",
    "Teacher",
    "TeacherOutput",
    "TeacherRow",
    "TokenChoice",
    "build_teacher",
    "list_teachers",
    "look_together",
    "resize_views",
    "share_backbones",
]
