"""A model's own processor is what runs; our rule of the same file gives the same pixels, or refuses by name."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from encoder_models import ROWS, SHIMMED
from processor_facts import FACTS
from torch import nn

from latemax.encoders import PatchEncoder, Preprocess
from latemax.encoders.preprocess import from_processor_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
torch.set_num_threads(1)


def photo(height: int, width: int, seed: int = 0):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def processor_class(name: str):
    """The Pillow form of a processor: releases before 5 have that under the plain name."""
    for form in (f"{name}Pil", name):
        try:
            cls = getattr(transformers, form)
        except (AttributeError, ImportError):
            continue
        if not getattr(cls, "is_dummy", False):
            return cls
    pytest.skip(f"{name} does not import here")


def vit(**options) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32, patch_size=8, **options)).eval()


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.hub)
@pytest.mark.parametrize("shape", [(50, 70), (301, 113), (256, 256), (1, 9)], ids=str)
@pytest.mark.parametrize("named", [True, False], ids=["class in the file", "class by the model"])
def test_our_rules_give_the_processors_pixels(fact, shape, named):
    config = dict(fact.config)
    if not named:
        config.pop("image_processor_type", None)
        config.pop("feature_extractor_type", None)
    processor = processor_class(fact.processor).from_dict(dict(config))
    expected = dict(processor(photo(*shape), return_tensors="pt"))
    ours = from_processor_config(config, fact.model_type)(photo(*shape))
    ours = ours if isinstance(ours, dict) else {"pixel_values": ours}
    assert ours.keys() == expected.keys()
    # The processor of DINOv3 resizes floats; Pillow rounds to 8 bits: one step of 1/255 over the least std.
    tolerance = 1 / 255 / 0.22 if fact.processor.startswith("DINOv3") else 1e-5
    for key, value in expected.items():
        torch.testing.assert_close(ours[key].float(), value.float(), atol=tolerance, rtol=1e-5)


RULES = {
    "shortest edge, no crop": {"size": {"shortest_edge": 32}, "do_center_crop": False},
    "both edges, clipped": {"size": {"shortest_edge": 32, "longest_edge": 40}, "do_center_crop": False},
    "both edges, not clipped": {"size": {"shortest_edge": 32, "longest_edge": 400}, "do_center_crop": False},
    "no resize": {"do_resize": False, "crop_size": {"height": 32, "width": 32}},
    "no resize, crop beyond the image": {"do_resize": False, "crop_size": {"height": 90, "width": 97}},
    "neither resize nor crop": {"do_resize": False, "do_center_crop": False},
    "squash, then crop": {"size": {"height": 40, "width": 50}, "crop_size": {"height": 33, "width": 33}},
    "crop of another shape": {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 32}},
    "scalar mean and std": {"image_mean": 0.4, "image_std": 0.3},
    "no normalisation": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "own factor": {"rescale_factor": 1 / 127},
    "bare numbers": {"size": 40, "crop_size": 32},
}


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(57, 83), (83, 57)], ids=str)
def test_every_switch_is_followed(name, rule, shape):
    processor = processor_class(name)(**RULES[rule])
    expected = processor(photo(*shape), return_tensors="pt")["pixel_values"]
    for config in (processor.to_dict(), {"image_processor_type": name, **RULES[rule]}):
        torch.testing.assert_close(from_processor_config(config)(photo(*shape)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "the rules of ConvNextImageProcessor are not followed"),
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "the rules of Qwen2VLImageProcessor are not followed"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "the rule do_pad of a processor file"),
        ({"size": {"max_height": 9, "max_width": 9}}, r"size \{'max_height': 9, 'max_width': 9\} of a processor file"),
    ],
)
def test_rules_that_are_not_followed_are_refused_by_name(config, text):
    with pytest.raises(ValueError, match=text):
        from_processor_config({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **config})


def save(folder, config, model=None):
    (model or vit()).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


CROP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def test_the_files_processor_runs_for_a_folder_and_for_a_model_loaded_from_it(tmp_path):
    save(tmp_path, CROP)
    expected = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo(50, 70), return_tensors="pt")
    for enc in (PatchEncoder.from_pretrained(tmp_path), PatchEncoder(transformers.ViTModel.from_pretrained(tmp_path))):
        assert type(enc.image_transform).__name__ == "OwnProcessor"
        assert torch.equal(enc.preprocess(photo(50, 70)), expected["pixel_values"])
        torch.testing.assert_close(enc.image_transform.rule(photo(50, 70)), expected["pixel_values"], atol=2e-2, rtol=0)
        assert enc.preprocess(photo(50, 70), size=(16, 24)).shape == (1, 3, 16, 24)
        pickle.loads(pickle.dumps(enc))


def test_a_processor_of_ones_own(tmp_path):
    processor = processor_class("CLIPImageProcessor")(**{k: v for k, v in CROP.items() if "type" not in k})
    enc = PatchEncoder(vit(), preprocess=processor)
    expected = processor(photo(50, 70), return_tensors="pt")["pixel_values"]
    assert torch.equal(enc.preprocess(photo(50, 70)), expected)

    class Both:
        image_processor = processor

    assert torch.equal(PatchEncoder(vit(), preprocess=Both()).preprocess(photo(50, 70)), expected)
    assert enc.encode(photo(50, 70)).crop[0].tolist() == pytest.approx([12 / 56, 4 / 40, 44 / 56, 36 / 40])
    call = PatchEncoder(vit(), preprocess=lambda image: torch.full((3, 32, 32), image.width / 100))
    assert (call.preprocess([photo(9, 50), photo(9, 70)])[:, 0, 0, 0] == torch.tensor([0.5, 0.7])).all()
    assert call.encode(photo(50, 70)).crop is None
    with pytest.raises(ValueError, match="size cannot be set: the rules of function are not followed here"):
        call.preprocess(photo(9, 9), size=(16, 16))
    with pytest.raises(ValueError, match=r"function must return a float tensor \[3, height, width\], got NoneType"):
        PatchEncoder(vit(), preprocess=lambda image: None).preprocess(photo(9, 9))
    with pytest.raises(TypeError, match="preprocess must be a Preprocess, an image processor of transformers"):
        PatchEncoder(vit(), preprocess={"size": 224})


def test_a_processor_that_cannot_run_is_followed_or_refused(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", broken)
    enc = PatchEncoder.from_pretrained(save(tmp_path, CROP))
    assert isinstance(enc.image_transform, Preprocess) and enc.image_transform.mean == (0.1, 0.2, 0.3)
    save(tmp_path, {**CROP, "image_processor_type": "SomeImageProcessor"})
    with pytest.raises(ValueError, match=r"rules of SomeImageProcessor are not followed.*torchvision::nms"):
        PatchEncoder.from_pretrained(tmp_path)
    assert PatchEncoder.from_pretrained(tmp_path, preprocess=Preprocess((32, 32), 0.5, 0.5))


def test_a_processor_of_other_inputs_is_refused():
    class Masks:
        model_input_names = ("pixel_values", "pixel_mask")

        def to_dict(self):
            return {"image_processor_type": "Masks"}

        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(1, 3, 32, 32), "pixel_mask": torch.ones(1, 32, 32)}

    with pytest.raises(ValueError, match=r"Masks returns \['pixel_mask', 'pixel_values'\]"):
        PatchEncoder(vit(), preprocess=Masks()).preprocess(photo(9, 9))


def test_images_of_several_sizes_are_encoded_one_by_one():
    enc = PatchEncoder(vit(), preprocess=Preprocess(None, 0.5, 0.5, shortest_edge=16))
    wide, tall = photo(20, 40), photo(60, 20)
    with pytest.raises(ValueError, match=r"keeps the aspect ratio, so one batch holds 16x32, 48x16"):
        enc.encode([wide, tall])
    out = enc.encode([wide, tall], batch_size=1)
    assert out.grid == [(2, 4), (6, 2)] and out.mask.sum(1).tolist() == [8, 12]
    assert (out.tokens[0, 8:] == 0).all() and out.crop.tolist() == [[0, 0, 1, 1]] * 2
    torch.testing.assert_close(out.tokens[:1, :8], enc.encode(wide).tokens)
    edge = Preprocess(None, 0.5, 0.5, longest_edge=32)
    assert edge(photo(30, 60)).shape == (1, 3, 16, 32) and edge(photo(60, 30)).shape == (1, 3, 32, 16)
    with pytest.raises(ValueError, match=r"size must be \(height, width\) where neither"):
        Preprocess(None, 0.5, 0.5)


@pytest.fixture
def marked():
    """A 48x64 image whose red tells the column and green the row."""
    rows, cols = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([cols * 3, rows * 3, 0 * rows], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (Preprocess((32, 32), 0.0, 1.0, shortest_edge=40, resample=2), None),
        (Preprocess((32, 32), 0.0, 1.0, shortest_edge=40, resample=2), 16),
        (Preprocess((32, 32), 0.0, 1.0, shortest_edge=40, resample=2), (24, 32)),
        (Preprocess((16, 24), 0.0, 1.0, resize_to=(32, 40), resample=2), None),
        (Preprocess((32, 32), 0.0, 1.0, resize=False), None),
        (Preprocess((64, 96), 0.0, 1.0, resize=False), None),
        (Preprocess(None, 0.0, 1.0, shortest_edge=24, resample=2), None),
        (Preprocess((21, 21), 0.0, 1.0, shortest_edge=40, resample=2, round_crop=True), None),
    ],
)
def test_the_crop_box_is_what_the_pixels_show(marked, rule, size):
    pixels = rule(marked, size=size)[0]
    left, top, right, bottom = rule.crop_box(marked, size)
    height, width = pixels.shape[-2:]
    # Red and green say where a pixel came from; away from the borders, which a filter blurs and padding blackens.
    x = left + (right - left) * (torch.arange(width) + 0.5) / width
    y = top + (bottom - top) * (torch.arange(height) + 0.5) / height
    inside_x, inside_y = (x > 0.05) & (x < 0.95), (y > 0.05) & (y < 0.95)
    seen = pixels[:, inside_y][:, :, inside_x] * 255 / 3
    torch.testing.assert_close(seen[0, 0], x[inside_x] * 64 - 0.5, atol=0.5, rtol=0)
    torch.testing.assert_close(seen[1, :, 0], y[inside_y] * 48 - 0.5, atol=0.5, rtol=0)


def test_encode_remembers_the_crop_box():
    row = next(row for row in ROWS if row.name == "DINOv2" and row.library == "transformers")
    enc = PatchEncoder(row.make()[0])
    out = enc.encode([photo(400, 600), photo(600, 400)])
    assert out.crop.shape == (2, 4) and out.crop.dtype == torch.float32
    # 73 over 64: the shorter side keeps 64/73 of itself.
    assert out.crop[0].tolist() == pytest.approx([22 / 109, 4 / 73, 86 / 109, 68 / 73])
    assert enc.encode(photo(400, 600), size=(32, 48)).crop.tolist() == [[0, 0, 1, 1]]
    assert enc(enc.preprocess(photo(9, 9))).crop is None
    tokens, mask, grid, prefix = out
    assert tokens is out.tokens and mask is out.mask and grid == out.grid and prefix is None


def needs(library: str) -> None:
    if not (importlib.util.find_spec(library) and SHIMMED):
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_the_library_s_transform_runs_and_ours_where_it_does_not_import(library, monkeypatch):
    needs(library)
    names = {"timm": "VisionTransformer", "open_clip": "VisionTransformer"}
    row = next(row for row in ROWS if (row.name, row.library) == (names[library], library))
    model, image = row.make()[0], photo(301, 211)
    own = PatchEncoder(model).image_transform
    assert own.name == f"{library}'s transform" and own.rule is not None
    for module in [m for m in sys.modules if m.startswith(f"{library}.data") or m == "open_clip.transform"]:
        monkeypatch.setitem(sys.modules, module, None)
    ours = PatchEncoder(model).image_transform
    assert isinstance(ours, Preprocess)
    torch.testing.assert_close(ours(image), own(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timm_s_crop_modes(mode):
    needs("timm")
    import timm

    model = timm.create_model("test_vit").eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": mode, "crop_pct": 0.8}
    own = PatchEncoder(model).image_transform
    assert (own.rule is None) == (mode == "border")
    if own.rule is not None:
        torch.testing.assert_close(own.rule(photo(301, 211)), own(photo(301, 211)), atol=1e-5, rtol=1e-5)


def test_a_giant_is_refused_before_the_processor_resizes_it():
    """Its resize before the crop would have 5,040,000 x 56 pixels."""
    processor = processor_class("BitImageProcessor")(
        size={"shortest_edge": 56}, crop_size={"height": 32, "width": 32}, do_center_crop=True, do_resize=True
    )
    encoder = PatchEncoder(vit(), preprocess=processor)
    with pytest.raises(ValueError, match="a 90000x1 image would be resized to 5040000x56"):
        encoder.preprocess([Image.new("RGB", (90_000, 1))])
    assert encoder.preprocess([Image.new("RGB", (900, 1))]).shape == (1, 3, 32, 32)
