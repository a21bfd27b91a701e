"""A teacher whose forward is dearer than a micro student's step, so that ratios of times have a sign."""

VIT_TI = {"spec": "timm:vit_tiny_patch16_224", "weights": "random", "image_size": 64}
