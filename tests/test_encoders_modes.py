"""encode() changes no modes, on any number of threads, and says that it is not for training; names of models."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from latemax.encoders import PatchEncoder, Preprocess, add_lora, hub, loading

pytest.importorskip("PIL", reason="Pillow is not installed")
torch.set_num_threads(1)
RULE = Preprocess((32, 32), 0.5, 0.5)
IMAGES = [np.full((32, 32, 3), 30 * i, np.uint8) for i in range(8)]


class Tower(nn.Module):
    """[b, 3, 32, 32] to [b, 16, 8], with dropout, an attention, and a parameter that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.drop = nn.Dropout(0.5)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.drop(self.patch(x).flatten(2).mT)
        return x + self.q_proj(x) * self.v_proj(x)


def encoder(model=None, **options) -> PatchEncoder:
    torch.manual_seed(0)
    return PatchEncoder(model or Tower(), n_prefix=0, preprocess=RULE, **options)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def set_modes(enc: PatchEncoder, parts: list[str]) -> None:
    enc.eval()
    for name in parts:
        enc.get_submodule(name).training = True


@pytest.mark.parametrize(
    "parts", [[], [""], ["", "projection"], ["model"], ["model.drop"], ["model.patch", "model.drop"]]
)
def test_every_module_gets_its_own_mode_back(parts):
    enc = encoder(projection=nn.Linear(8, 4))
    expected = enc.eval().encode(IMAGES).tokens
    set_modes(enc, parts)
    before = modes(enc)
    assert torch.equal(enc.encode(IMAGES, batch_size=3).tokens, expected)
    assert modes(enc) == before
    with pytest.raises(TypeError, match=r"images.1. must be a Pillow image"):
        enc.encode([IMAGES[0], None])
    assert modes(enc) == before


def test_nothing_is_set_where_nothing_is_in_training():
    class Watched(Tower):
        def __setattr__(self, name, value):
            assert name != "training" or not getattr(self, "armed", False), "a mode was set"
            super().__setattr__(name, value)

    model = Watched().eval()
    enc = encoder(model)
    enc.eval()
    model.armed = True
    enc.encode(IMAGES)


@pytest.mark.parametrize("shared", [False, True], ids=["one encoder", "encoders that share a model"])
def test_threads_never_see_training_mode(shared):
    model = Tower()
    encoders = [encoder(model) for _ in range(4)] if shared else [encoder(model)] * 4
    expected = encoders[0].eval().encode(IMAGES).tokens
    for enc in encoders:
        enc.train()
    model.patch.eval()
    before, wrong = modes(model), []

    def work(enc):
        for i in range(20):
            # torch's products round by the shape on some processors; dropout changes whole numbers
            tokens = enc.encode(IMAGES, batch_size=1 + i % 3).tokens
            wrong.append(not torch.allclose(tokens, expected, rtol=0, atol=1e-4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(enc,)) for enc in encoders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 80 and not any(wrong)
    assert modes(model) == before and all(enc.training for enc in encoders)


def test_the_mode_comes_back_with_the_last_of_two_encodes():
    first_in, second_done = threading.Event(), threading.Event()

    class Slow(Tower):
        def forward(self, x):
            if threading.current_thread().name == "slow":
                first_in.set()
                assert second_done.wait(10)
                time.sleep(0.01)
            assert not self.training and not self.drop.training
            return super().forward(x)

    enc = encoder(Slow())
    enc.train()
    results = []
    enc._warned = True
    thread = threading.Thread(target=lambda: results.append(enc.encode(IMAGES)), name="slow")
    thread.start()
    assert first_in.wait(10)
    enc.encode(IMAGES)
    assert not enc.model.training
    second_done.set()
    thread.join()
    assert results and enc.model.training and enc.model.drop.training


def test_a_copy_encodes_too():
    enc = encoder()
    enc.train()
    with torch.no_grad():
        twin = copy.deepcopy(enc)
        twin.encode(IMAGES)
    assert enc.training and twin.training


def warned(call) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [str(w.message) for w in caught]
    assert all("encode() computes no gradients" in text for text in found) and len(found) <= 1
    return bool(found)


def test_encode_in_a_training_loop_warns_once():
    enc = encoder()
    assert not warned(lambda: enc.encode(IMAGES))
    enc.train()
    assert warned(lambda: enc.encode(IMAGES)) and not warned(lambda: enc.encode(IMAGES))
    adapted = encoder(Tower().eval())
    lora = add_lora(adapted, rank=2)
    with torch.no_grad():
        assert not warned(lambda: adapted.encode(IMAGES))
    assert warned(lambda: adapted.encode(IMAGES)) and not warned(lambda: adapted.encode(IMAGES))
    lora.merge()
    frozen = encoder(Tower().requires_grad_(False), projection=nn.Linear(8, 4))
    assert warned(lambda: frozen.encode(IMAGES))
    assert not warned(lambda: encoder(Tower().requires_grad_(False)).encode(IMAGES))
    # What the warning advises has gradients.
    assert adapted(adapted.preprocess(IMAGES)).tokens.requires_grad


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that cannot be reached, an empty cache, and a count of the requests."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import huggingface_hub

    calls = []

    def refused(self, name, **options):
        calls.append(name)
        raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    return calls


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dinov2-smal", r"dinov2-smal is neither a folder nor a known name; did you mean dinov2-small\? Known names: "),
        ("dinov2_small", r"did you mean dinov2-small\?"),
        ("nothing-like-it", r"neither a folder nor a known name. Known names: dinov2-small, timm:\.\.\."),
        ("tim:vit_tiny", "tim:vit_tiny is neither a folder nor a known name"),
    ],
)
def test_names_that_no_hub_can_know_are_refused_at_once(no_hub, name, text):
    with pytest.raises(ValueError, match=text) as caught:
        PatchEncoder.from_pretrained(name)
    assert "\n" not in str(caught.value) and not no_hub


def test_an_unreachable_hub_is_asked_once_and_not_retried(no_hub):
    start = time.monotonic()
    with pytest.raises(
        OSError, match=r"facebook/dinov2-smal is not in the cache.*refused; did you mean dinov2-small\?"
    ):
        PatchEncoder.from_pretrained("facebook/dinov2-smal")
    assert no_hub == ["facebook/dinov2-smal"] and time.monotonic() - start < 5


def test_a_model_the_hub_does_not_know(no_hub, monkeypatch):
    def unknown(name):
        raise hub.UnknownModelError(f"name_or_path: the hub has no model {name}, or not for this user")

    monkeypatch.setattr(hub, "unreachable", unknown)
    with pytest.raises(ValueError, match="the hub has no model someone/nothing"):
        PatchEncoder.from_pretrained("someone/nothing")


def test_a_cached_model_loads_without_the_hub(no_hub, monkeypatch, tmp_path):
    import huggingface_hub
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path)
    cached = {"config.json": str(tmp_path / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached.get(file))
    seen = []

    def from_cache(name, **options):
        seen.append((name, options))
        return model

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_cache)
    with pytest.raises(OSError, match=r"preprocessor_config.json of a/b is not in the cache.*pass preprocess="):
        PatchEncoder.from_pretrained("a/b")
    assert PatchEncoder.from_pretrained("a/b", preprocess=RULE).image_transform is RULE
    assert seen == [("a/b", {"local_files_only": True})] * 2
    # A bare model that names the hub asks it too, rather than guess.
    model.config._name_or_path = "a/b"
    model.name_or_path = "a/b"
    with pytest.raises(OSError, match=r"preprocessor_config.json of a/b is not in the cache"):
        PatchEncoder(model).encode(IMAGES)
    model.name_or_path = "a folder/that is/gone"
    assert PatchEncoder(model).encode(IMAGES).grid == (4, 4)


def test_known_names_are_local(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "_transformers", lambda name, with_processor: (Tower(), RULE))
    monkeypatch.setitem(loading.LOCAL_NAMES, "tower", lambda: tmp_path)
    assert PatchEncoder.from_pretrained("tower", n_prefix=0).image_transform is RULE
