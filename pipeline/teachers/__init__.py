"""Teachers: frozen CLIP and DINO ViTs that turn views into patch tokens and an attention row to focus by."""

from pipeline.configs.teachers import TokenChoice
from pipeline.teachers.modules import ModuleEntry
from pipeline.teachers.mrmae import PatchEncoder
from pipeline.teachers.registry import (
    NO_ATTENTION,
    TEACHERS,
    Entry,
    TeacherRow,
    build_teacher,
    describe_teacher,
    list_teachers,
)
from pipeline.teachers.sharing import run_teachers, share_backbones
from pipeline.teachers.teacher import Backbone, Teacher, TeacherOutput, resize_views

__all__ = [
    "NO_ATTENTION",
    "TEACHERS",
    "Backbone",
    "Entry",
    "ModuleEntry",
    "PatchEncoder",
    "Teacher",
    "TeacherOutput",
    "TeacherRow",
    "TokenChoice",
    "build_teacher",
    "describe_teacher",
    "list_teachers",
    "resize_views",
    "run_teachers",
    "share_backbones",
]
