"""Preprocessor files of widely used ViTs: their settings, as facts, each with its source.

``hub`` names the model whose ``preprocessor_config.json`` says this, as quoted in public repositories; ``source`` says
where else it was read. Settings that do not touch pixels are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ALL_ON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 0.00392156862745098}
OLD = {"do_resize": True, "do_normalize": True}


class Fact(NamedTuple):
    """``processor`` is the class of transformers that loads the file, ``model_type`` that of the model."""

    hub: str
    processor: str
    model_type: str
    config: dict[str, Any]
    source: str = "the file on the hub"


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


FACTS = (
    Fact(
        "google/vit-base-patch16-224-in21k",
        "ViTImageProcessor",
        "vit",
        {**OLD, **HALF, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 224},
        "printed in Hugging Face's blog post 'Fine-Tune ViT for Image Classification with Transformers'",
    ),
    Fact(
        "google/vit-base-patch16-224",
        "ViTImageProcessor",
        "vit",
        {**ALL_ON, **HALF, "image_processor_type": "ViTImageProcessor", "resample": 2, "size": square(224)},
        "a fine-tuned copy: github.com/bjornburmeister00-stack/PlantNet, preprocessor_config.json at b750bba",
    ),
    Fact(
        "facebook/dino-vits16",
        "ViTImageProcessor",
        "vit",
        {**ALL_ON, **IMAGENET, "image_processor_type": "ViTImageProcessor", "resample": 2, "size": square(224)},
    ),
    Fact(
        "facebook/deit-base-distilled-patch16-224",
        "DeiTImageProcessor",
        "deit",
        {**ALL_ON, "do_center_crop": True, "image_processor_type": "DeiTImageProcessor", **IMAGENET},
        "IMAGENET values of the model; the rest is the class's defaults in transformers, "
        "src/transformers/models/deit/image_processing_deit_fast.py",
    ),
    Fact(
        "facebook/deit-base-distilled-patch16-224 (old form)",
        "DeiTImageProcessor",
        "deit",
        {
            **OLD,
            **IMAGENET,
            "feature_extractor_type": "DeiTFeatureExtractor",
            "do_center_crop": True,
            "crop_size": 224,
            "size": 256,
            "resample": 3,
        },
        "the defaults of transformers' DeiTFeatureExtractor, src/transformers/models/deit/feature_extraction_deit.py",
    ),
    Fact(
        "microsoft/beit-base-patch16-224",
        "BeitImageProcessor",
        "beit",
        {
            **OLD,
            **HALF,
            "feature_extractor_type": "BeitFeatureExtractor",
            "do_center_crop": False,
            "crop_size": 224,
            "size": 224,
            "resample": 2,
        },
    ),
    Fact(
        "openai/clip-vit-large-patch14",
        "CLIPImageProcessor",
        "clip",
        {
            **OLD,
            **OPENAI,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "do_center_crop": True,
            "crop_size": 224,
            "size": 224,
            "resample": 3,
        },
        "the form of github.com/Q-Future/Q-Align, preprocessor_config.json at fabb8a0, which has 448 for 224",
    ),
    Fact(
        "the CLIP feature extractor of Stable Diffusion",
        "CLIPImageProcessor",
        "clip_vision_model",
        {
            **ALL_ON,
            **OPENAI,
            "image_processor_type": "CLIPFeatureExtractor",
            "do_center_crop": True,
            "crop_size": square(224),
            "size": {"shortest_edge": 224},
            "resample": 3,
        },
    ),
    Fact(
        "google/siglip-so400m-patch14-384",
        "SiglipImageProcessor",
        "siglip",
        {**ALL_ON, **HALF, "image_processor_type": "SiglipImageProcessor", "resample": 3, "size": square(384)},
    ),
    Fact(
        "google/siglip2-base-patch16-224",
        "SiglipImageProcessor",
        "siglip",
        {**ALL_ON, **HALF, "image_processor_type": "SiglipImageProcessor", "resample": 2, "size": square(224)},
    ),
    Fact(
        "google/siglip2-so400m-patch16-naflex",
        "Siglip2ImageProcessor",
        "siglip2",
        {
            **HALF,
            "image_processor_type": "Siglip2ImageProcessorFast",
            "max_num_patches": 256,
            "patch_size": 16,
            "resample": 2,
        },
    ),
    Fact(
        "facebook/dinov2-base",
        "BitImageProcessor",
        "dinov2",
        {
            **ALL_ON,
            **IMAGENET,
            "image_processor_type": "BitImageProcessor",
            "do_center_crop": True,
            "crop_size": square(224),
            "size": {"shortest_edge": 256},
            "resample": 3,
        },
    ),
    Fact(
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        "DINOv3ViTImageProcessor",
        "dinov3_vit",
        {
            **ALL_ON,
            **IMAGENET,
            "image_processor_type": "DINOv3ViTImageProcessorFast",
            "crop_size": None,
            "do_center_crop": None,
            "default_to_square": True,
            "size": square(224),
            "resample": 2,
        },
    ),
)
