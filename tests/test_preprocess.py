"""Images of every kind to pixel values: right numbers, or an error that names the image."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from encoder_models import ROWS, SHIMMED

from latemax.encoders import PatchEncoder, Preprocess
from latemax.encoders.images import load_image
from latemax.encoders.pixels import fit_patches
from latemax.encoders.preprocess import from_processor_config, from_torchvision_transforms

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
PLAIN = Preprocess((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
DINO_CONFIG = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def photo(height, width, seed=0):
    """A smooth random colour image, as uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def pixels(image):
    return np.asarray(load_image(image))


def test_values_mean_and_std():
    rule = Preprocess((2, 2), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 1] = (255, 51, 102)
    out = rule(image)
    assert out.shape == (1, 3, 2, 2) and out.dtype == torch.float32
    torch.testing.assert_close(out[0, :, 0, 1], torch.tensor([1.0, (0.2 - 0.25) / 0.25, 0.2]))
    torch.testing.assert_close(out[0, :, 1, 0], torch.tensor([-1.0, -1.0, 0.0]))


def test_one_image_a_list_and_a_batch_are_alike():
    a, b = photo(20, 30), photo(20, 30, 1)
    both = PLAIN([a, b])
    assert torch.equal(both[:1], PLAIN(a)) and torch.equal(both[1:], PLAIN(Image.fromarray(b)))
    assert torch.equal(both, PLAIN(np.stack([a, b])))
    batch = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2)
    assert torch.equal(both, PLAIN(batch))
    assert torch.equal(both, PLAIN(x for x in (a, b)))


def test_array_kinds_agree():
    image = photo(9, 11)
    for other in (
        torch.from_numpy(image).permute(2, 0, 1),
        image / 255.0,
        (image / 255.0).astype(np.float32),
        image.astype(np.uint16) * 257,
        (torch.from_numpy(image) / 255).permute(2, 0, 1),
    ):
        assert np.array_equal(pixels(other), image)
    grey = image[:, :, 0]
    for other in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(pixels(other), np.repeat(grey[:, :, None], 3, 2))
    assert np.array_equal(pixels(grey > 100)[:, :, 0], np.where(grey > 100, 255, 0))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_pillow_modes_become_rgb(mode):
    out = load_image(Image.fromarray(photo(7, 5)).convert(mode))
    assert out.mode == "RGB" and out.size == (5, 7)


def test_alpha_is_laid_over_white():
    image = np.zeros((2, 3, 4), np.uint8)
    image[:, 1, 3] = 255
    image[:, 2] = (255, 0, 0, 128)
    for source in (image, Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1)):
        out = pixels(source)
        assert (out[:, 0] == 255).all() and (out[:, 1] == 0).all()
        assert out[0, 2].tolist() == [255, 127, 127]
    assert (pixels(Image.new("LA", (2, 2), (0, 0))) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.info["transparency"] = 0
    assert (pixels(palette) == 255).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / "depth.png"
    Image.fromarray(values).save(path)
    expected = (values / 257).round().astype(np.uint8)
    for source in (path, str(path), values, Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        out = pixels(source)
        assert np.array_equal(out[:, :, 0], expected) and np.array_equal(out[:, :, 1], expected)


def test_exif_turns_the_image_upright(tmp_path):
    image = Image.fromarray(photo(6, 10))
    exif = image.getexif()
    # 6: turned a quarter clockwise to be upright.
    exif[0x0112] = 6
    path = tmp_path / "phone.png"
    image.save(path, exif=exif)
    assert load_image(path).size == (6, 10)
    assert np.array_equal(pixels(path), np.rot90(photo(6, 10), -1))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (300, 1)], ids=str)
def test_tiny_images(size):
    out = from_processor_config({**DINO_CONFIG})(np.full((*size, 3), 128, np.uint8))
    assert out.shape == (1, 3, 224, 224)
    expected = (128 / 255 - torch.tensor(DINO_CONFIG["image_mean"])) / torch.tensor(DINO_CONFIG["image_std"])
    torch.testing.assert_close(out[0, :, 112, 112], expected, atol=1e-5, rtol=1e-5)


def test_a_crop_of_a_giant_is_refused():
    with pytest.raises(
        ValueError, match=r"a 1x500000 image would be resized to 256x128000000.*pass size=\(height, width\)"
    ):
        from_processor_config(DINO_CONFIG)(np.zeros((500000, 1, 3), np.uint8))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff", "gif"])
@pytest.mark.parametrize("damage", ["cut", "header", "text", "empty"])
def test_damaged_files_are_refused_by_name(tmp_path, extension, damage):
    path = tmp_path / f"broken.{extension}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    content = {"cut": content[: len(content) // 2], "header": content[:20], "text": b"no image at all", "empty": b""}[
        damage
    ]
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"images\[1\] \(.*broken.{extension}\): (not a readable|corrupt or truncated) image"
    ):
        PLAIN([photo(4, 4), path])


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images\[0\] \(.*nowhere.png\): no such file"):
        PLAIN(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"images\[0\] \(.*\): not a readable image"):
        PLAIN(tmp_path)


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"images\[0\]: an array must be \[h, w\] or \[h, w, channels\]"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"an array must be .* got \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"a tensor must be \[channels, h, w\].*got \(8, 8, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.full((4, 4, 3), 255.0), ValueError, r"float values must be in \[0, 1\], got 255 to 255"),
        (np.full((4, 4, 3), -0.5), ValueError, "call the encoder on them directly"),
        (np.full((4, 4, 3), np.nan), ValueError, r"float values must be in \[0, 1\], got nan"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "must be uint8, uint16, bool or floats .* got int64"),
        (Image.new("F", (2, 2)), ValueError, "a float image has no fixed range"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), ValueError, r"must be in 0..65535, got 70000"),
        (12, TypeError, r"images\[0\] must be a Pillow image, a path, an array or a tensor, got int"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_bad_images(image, error, text):
    with pytest.raises(error, match=text):
        PLAIN([image])


def test_no_images_and_bad_rules():
    with pytest.raises(ValueError, match="at least one image, got an empty list"):
        PLAIN([])
    with pytest.raises(ValueError, match="mean must be three numbers"):
        Preprocess((8, 8), (0.5,), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="std must not hold a 0"):
        Preprocess((8, 8), (0.5, 0.5, 0.5), (1.0, 0.0, 1.0))


@pytest.mark.parametrize("bad", [0, -8, 1.5, (8,), (8, 0), "8", True], ids=str)
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match=r"size must be None, an int > 0 or \(height, width\), got"):
        PLAIN(photo(4, 4), size=bad)


def test_size_squashes_or_scales_the_rule():
    rule = from_processor_config(DINO_CONFIG)
    image = photo(100, 200)
    squashed = rule(image, size=(28, 56))
    assert squashed.shape == (1, 3, 28, 56)
    expected = np.asarray(Image.fromarray(image).resize((56, 28), Image.Resampling.BICUBIC)) / 255
    expected = (expected - DINO_CONFIG["image_mean"]) / DINO_CONFIG["image_std"]
    torch.testing.assert_close(squashed[0].permute(1, 2, 0).numpy(), expected.astype(np.float32), atol=1e-5, rtol=1e-5)
    assert rule(image, size=112).shape == (1, 3, 112, 112)
    assert rule._resized(112).shortest_edge == 128


PROCESSORS = {
    "BitImageProcessor": DINO_CONFIG,
    "ViTImageProcessor": {"size": {"height": 32, "width": 48}, "resample": 2},
    "CLIPImageProcessor": {},
    "SiglipImageProcessor": {"size": {"height": 64, "width": 64}},
    "DeiTImageProcessor": {},
    "BeitImageProcessor": {},
    "Siglip2ImageProcessor": {"max_num_patches": 50},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(50, 70), (301, 113), (256, 256)], ids=str)
def test_same_pixels_as_the_processors_of_transformers(name, shape):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    # Without torchvision, transformers gives its Pillow processors their own name; we follow Pillow.
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    try:
        processor = kind(**PROCESSORS[name])
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    image = Image.fromarray(photo(*shape))
    expected = processor(image, return_tensors="pt")
    ours = from_processor_config(json.loads(processor.to_json_string()))(image)
    if isinstance(ours, dict):
        for key in ("pixel_attention_mask", "spatial_shapes"):
            assert torch.equal(ours[key].long(), expected[key].long())
        ours = ours["pixel_values"]
    torch.testing.assert_close(ours, expected["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (480, 640), (1000, 3), (17, 1024)], ids=str)
def test_naflex_sizes_fill_the_budget(size):
    height, width = fit_patches(size, (16, 16), 256)
    n = (height // 16) * (width // 16)
    assert height % 16 == 0 and width % 16 == 0 and 1 <= n <= 256
    if size == (480, 640):
        assert n > 220 and math.isclose(width / height, 4 / 3, rel_tol=0.1)


def test_models_tell_their_own_preprocessing():
    found = {}
    for row in ROWS:
        if row.missing:
            continue
        model, _ = row.make()
        try:
            found[row.library, row.name] = PatchEncoder(model).image_transform.rule
        except ValueError as error:
            found[row.library, row.name] = str(error)
    if ("transformers", "ViT") in found:
        assert found["transformers", "CLIP, full"].mean[0] == 0.48145466
        assert found["transformers", "DINOv2"].shortest_edge == 73 and found["transformers", "DINOv2"].size == (64, 64)
        assert found["transformers", "SigLIP 2 NaFlex"].max_patches == 16
        assert "does not tell its image size, mean and std" in found["transformers", "I-JEPA"]
    if ("timm", "Beit") in found:
        assert found["timm", "VisionTransformer"].mean == (0.5, 0.5, 0.5)
        assert found["torchvision", "VisionTransformer"].mean[0] == 0.485
        assert found["open_clip", "VisionTransformer"].mean[0] == 0.48145466
        sizes = {key: rule.size for key, rule in found.items() if key[0] in ("timm", "torchvision", "open_clip")}
        assert sizes.pop(("open_clip", "TimmModel (timm trunk)")) == (160, 160)
        naflex = {key: sizes.pop(key) for key in list(sizes) if "NaFlex" in key[1]}
        assert set(sizes.values()) == {(64, 64)} and naflex


def test_same_pixels_as_timm_and_torchvision():
    if not (importlib.util.find_spec("timm") and SHIMMED):
        pytest.skip("timm is not installed")
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.models import ViT_B_16_Weights

    image = Image.fromarray(photo(301, 211))
    model = timm.create_model("test_vit").eval()
    expected = create_transform(**resolve_model_data_config(model), is_training=False)(image)
    own = PatchEncoder(model).image_transform
    torch.testing.assert_close(own(image)[0], expected)
    torch.testing.assert_close(own.rule(image)[0], expected, atol=1e-5, rtol=1e-5)
    transforms = ViT_B_16_Weights.DEFAULT.transforms()
    ours = from_torchvision_transforms(transforms)
    assert (ours.size, ours.shortest_edge, ours.resample, ours.mean[0]) == ((224, 224), 256, 2, 0.485)
    torch.testing.assert_close(ours(image)[0], transforms(image), atol=1e-5, rtol=1e-5)


def test_same_pixels_as_open_clip():
    if not (importlib.util.find_spec("open_clip") and SHIMMED):
        pytest.skip("open_clip is not installed")
    from encoder_models import _open_clip_vit
    from open_clip.transform import image_transform

    visual = _open_clip_vit()().visual
    image = Image.fromarray(photo(301, 211))
    expected = image_transform(64, is_train=False)(image)
    own = PatchEncoder(visual).image_transform
    torch.testing.assert_close(own(image)[0], expected)
    torch.testing.assert_close(own.rule(image)[0], expected, atol=1e-5, rtol=1e-5)
