"""What a cache may be: its store, its precision, the attention that it holds."""

from typing import Literal

StoreName = Literal["zarr", "webdataset"]
AttentionKind = Literal["mean", "heads", "none"]
SummaryKind = Literal["class"]
QuantiserName = Literal["int8", "int4", "float16", "float32"]
