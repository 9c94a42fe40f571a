"""Adapter files: all that was trained with a LoRA goes round, and nothing that does not fit is loaded."""

from __future__ import annotations

import pytest
import torch
from encoder_models import ROWS
from test_lora import Attention, stir, tokens
from torch import nn

from latemax.encoders import LoRA, PatchEncoder, add_lora

torch.set_num_threads(1)


class Tower(nn.Module):
    """Patches through one attention: [b, 3, 8, 8] to [b, 4, 8]."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.attention = Attention(fused=False)

    def forward(self, x):
        q, k, v = self.attention(self.patch(x).flatten(2).mT).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def tower_encoder(**options):
    torch.manual_seed(0)
    return PatchEncoder(Tower(), n_prefix=0, **options)


@pytest.mark.parametrize(
    "own", [{"projection": 5}, {"final_norm": True}, {"projection": 5, "final_norm": True}], ids=str
)
@pytest.mark.parametrize("with_safetensors", [True, False])
def test_a_file_holds_all_that_was_trained(own, with_safetensors, tmp_path, monkeypatch):
    if not with_safetensors:
        monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)

    def make():
        options = {"projection": nn.Linear(8, 5, bias=False)} if "projection" in own else {}
        return tower_encoder(**options, **({"final_norm": nn.LayerNorm(8)} if "final_norm" in own else {}))

    enc, x = make(), torch.randn(2, 3, 8, 8)
    lora = add_lora(enc, rank=2)
    stir(lora)
    with torch.no_grad():
        for module in (enc.projection, enc.final_norm):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    lora.save(tmp_path / "adapter")
    fresh = make()
    LoRA.from_file(tmp_path / "adapter", fresh)
    assert torch.equal(tokens(fresh, x), tokens(enc, x))
    other = make()
    add_lora(other, rank=2).load(tmp_path / "adapter")
    assert torch.equal(tokens(other, x), tokens(enc, x))


def test_an_encoder_of_another_shape_is_refused_and_left_as_it_was(tmp_path):
    def make(width=None, **options):
        return tower_encoder(projection=None if width is None else nn.Linear(8, width, bias=False), **options)

    add_lora(make(5), rank=2).save(tmp_path / "projected")
    add_lora(make(), rank=2).save(tmp_path / "plain")
    for enc, file, text in (
        (make(), "projected", r"trained in an encoder of \{'projection': 'module'.*loaded into one of"),
        (make(5), "plain", r"trained in an encoder of \{'projection': None.*PatchEncoder\(model, \*\*LoRA.encoder_opt"),
        (make(7), "projected", r"projection.weight must be \(7, 8\), got \(5, 8\)"),
        (make(final_norm=None), "plain", r"'final_norm': 'auto'\}, loaded into one of .*'final_norm': None"),
        (Tower(), "projected", r"the file holds \['projection'\], and the model here has none"),
    ):
        before = {key: value.clone() for key, value in enc.state_dict().items()}
        with pytest.raises(ValueError, match=text):
            LoRA.from_file(tmp_path / file, enc)
        after = enc.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    # The plain base model can take the factors that need nothing else.
    assert LoRA.from_file(tmp_path / "plain", Tower()).sites


def test_files_of_the_first_format_are_read(tmp_path):
    enc, x = tower_encoder(), torch.randn(2, 3, 8, 8)
    lora = add_lora(enc, rank=2)
    stir(lora)
    config = {"format": "latemax-lora-1", "rank": 2, "alpha": 16, "targets": ["q", "v"]}
    torch.save({"config": config, "state": lora.state_dict()}, tmp_path / "old")
    fresh = tower_encoder()
    LoRA.from_file(tmp_path / "old", fresh)
    assert torch.equal(tokens(fresh, x), tokens(enc, x))
    assert LoRA.encoder_options(tmp_path / "old") == {"projection": None, "final_norm": "auto"}
    with pytest.raises(ValueError, match=r"the file holds no projection, and the model here has \['projection'\]"):
        LoRA.from_file(tmp_path / "old", tower_encoder(projection=nn.Linear(8, 5, bias=False)))


def test_the_encoder_of_a_file_can_be_rebuilt(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    row = next(row for row in ROWS if (row.name, row.library) == ("DINOv2", "transformers"))
    model, x = row.make()
    enc = PatchEncoder(model, projection=6, final_norm=None)
    lora = add_lora(enc, rank=2)
    stir(lora)
    lora.save(tmp_path / "adapter")
    options = LoRA.encoder_options(tmp_path / "adapter")
    assert options == {"projection": 6, "final_norm": None}
    fresh = PatchEncoder(row.make()[0], **options)
    LoRA.from_file(tmp_path / "adapter", fresh)
    assert torch.equal(tokens(fresh, x), tokens(enc, x))
    for own, text in (
        ({"projection": nn.Linear(8, 5)}, "trained with a projection of its own"),
        ({"final_norm": nn.LayerNorm(8)}, "trained with a final norm of its own"),
    ):
        add_lora(tower_encoder(**own), rank=2).save(tmp_path / "own")
        with pytest.raises(ValueError, match=text):
            LoRA.encoder_options(tmp_path / "own")


def test_files_that_do_not_fit(tmp_path):
    lora = add_lora(Attention(), rank=2)
    lora.save(tmp_path / "two")
    with pytest.raises(ValueError, match=r"saved with other settings \(file, here\): {'rank': \(2, 3\)}"):
        add_lora(Attention(), rank=3).load(tmp_path / "two")
    add_lora(Attention(), rank=2).load(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="no such file"):
        lora.load(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"not a file of ours")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    with pytest.raises(ValueError, match="not a readable LoRA file"):
        lora.load(tmp_path / "junk")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a LoRA file of this library"):
        lora.load(tmp_path / "other")
    other = Attention(fused=False)
    with pytest.raises(ValueError, match="it must come from the same architecture"):
        LoRA.from_file(tmp_path / "two", other)
    assert not any("parametrizations" in key for key in other.state_dict())
