"""LoRA on W_Q and W_V: nothing at first, only the factors learn, merge and removal are exact, files go round."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_models import ROWS
from torch import nn

from latemax.encoders import LoRA, PatchEncoder, add_lora

torch.set_num_threads(1)


def row_id(row):
    return f"{row.library}-{row.name.replace(', ', '-').replace(' ', '_')}"


@pytest.fixture(params=ROWS, ids=row_id)
def encoder(request):
    if request.param.missing:
        pytest.skip(request.param.missing)
    model, inputs = request.param.make()
    return PatchEncoder(model, normalize=False), inputs


def tokens(enc, inputs):
    with torch.no_grad():
        return enc(inputs).tokens


def stir(lora, scale=0.3):
    """Gives every factor a random value, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))


class Attention(nn.Module):
    """Separate or fused projections, read as timm's BEiT reads them: by weight, never through the layer's forward."""

    def __init__(self, width=8, fused=True):
        super().__init__()
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        if hasattr(self, "qkv"):
            return nn.functional.linear(x, self.qkv.weight)
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)


def test_q_and_v_of_every_block_are_adapted(encoder):
    enc, _ = encoder
    # test_vit, the trunk of open_clip's TimmModel, is six blocks deep; the others have two.
    blocks = 6 if "trunk" in "".join(dict(enc.model.named_modules())) else 2
    names = {name for name, _ in enc.model.named_parameters()}
    lora = add_lora(enc, rank=2)
    assert set(lora.sites) <= names
    assert len(lora.sites) in (blocks, 2 * blocks)
    # A and B, for q and v.
    assert len(list(lora.parameters())) == 2 * 2 * blocks


def test_no_effect_at_first_then_an_effect(encoder):
    enc, inputs = encoder
    before = tokens(enc, inputs)
    lora = add_lora(enc, rank=2)
    assert torch.equal(tokens(enc, inputs), before)
    stir(lora)
    assert (tokens(enc, inputs) - before).abs().max() > 1e-3


def test_each_factor_gets_a_gradient_and_nothing_else_does(encoder):
    enc, inputs = encoder
    lora = add_lora(enc, rank=2)
    stir(lora)
    torch.manual_seed(2)
    out = enc(inputs).tokens
    (out * torch.randn_like(out)).sum().backward()
    factors = {id(p) for p in lora.parameters()}
    for parameter in enc.parameters():
        assert (parameter.grad is not None) == (id(parameter) in factors)
    assert all(p.grad.abs().max() > 0 for p in lora.parameters())


def test_merge_is_exact_and_leaves_clean_keys(encoder):
    enc, inputs = encoder
    keys = list(enc.model.state_dict())
    parameters = [id(p) for p in enc.model.parameters()]
    trainable = {n for n, p in enc.model.named_parameters() if p.requires_grad}
    lora = add_lora(enc, rank=2)
    stir(lora)
    adapted = tokens(enc, inputs)
    assert list(enc.model.state_dict()) != keys
    lora.merge()
    assert torch.equal(tokens(enc, inputs), adapted)
    assert list(enc.model.state_dict()) == keys
    assert [id(p) for p in enc.model.parameters()] == parameters
    assert {n for n, p in enc.model.named_parameters() if p.requires_grad} == trainable


def test_remove_puts_the_model_back(encoder):
    enc, inputs = encoder
    before = copy.deepcopy(enc.model.state_dict())
    plain, parameters = tokens(enc, inputs), [id(p) for p in enc.model.parameters()]
    lora = add_lora(enc, rank=2)
    stir(lora)
    lora.remove()
    after = enc.model.state_dict()
    # In the old order: an optimiser keeps its state by index.
    assert list(after) == list(before) and [id(p) for p in enc.model.parameters()] == parameters
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(tokens(enc, inputs), plain)


@pytest.mark.parametrize("with_safetensors", [True, False])
def test_files_go_round(encoder, tmp_path, monkeypatch, with_safetensors):
    enc, inputs = encoder
    if with_safetensors:
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    else:
        monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    twin = copy.deepcopy(enc)
    lora = add_lora(enc, rank=3, alpha=5)
    stir(lora)
    path = tmp_path / "lora.bin"
    lora.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["lora.bin"]
    loaded = LoRA.from_file(path, twin)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (3, 5, ("q", "v"))
    assert loaded.sites == lora.sites
    assert torch.equal(tokens(twin, inputs), tokens(enc, inputs))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("targets", [("q",), ("v",), ("q", "v"), ("k",), ("v", "q", "k")], ids="".join)
def test_only_the_targets_change(fused, targets):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(fused=fused))
    x = torch.randn(3, 8)
    before = model(x).detach().chunk(3, -1)
    lora = add_lora(model, rank=2, alpha=6, targets=targets)
    stir(lora)
    state = lora.state_dict()
    for target, old, new in zip("qkv", before, model(x).chunk(3, -1), strict=True):
        name = "0.qkv.weight" if fused else f"0.{target}_proj.weight"
        if target in targets:
            update = state[f"{name}:{target}.b"] @ state[f"{name}:{target}.a"] * (6 / 2)
            torch.testing.assert_close(new, old + x @ update.T)
        else:
            assert torch.equal(new, old)


def test_names_of_separate_projections():
    for q, v in (("query", "value"), ("to_q", "to_v"), ("wq", "wv")):
        block = nn.Module()
        block.add_module(q, nn.Linear(4, 4))
        block.add_module(v, nn.Linear(4, 4))
        assert add_lora(block, rank=1).sites == [f"{q}.weight", f"{v}.weight"]


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}], ids=["one weight", "three weights"])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(widths, training):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True, **widths).train(training)
    q = torch.randn(2, 5, 8)
    k, v = torch.randn(2, 5, widths.get("kdim", 8)), torch.randn(2, 5, widths.get("vdim", 8))
    if not widths:
        k = v = q
    before = model(q, k, v)[0]
    lora = add_lora(model, rank=2)
    assert lora.sites == (["q_proj_weight", "v_proj_weight"] if widths else ["in_proj_weight"])
    # With frozen weights only, torch multiplies in another order here (1e-7), so this one is not bit for bit.
    torch.testing.assert_close(model(q, k, v)[0], before)
    stir(lora)
    changed = model(q, k, v)[0]
    assert (changed - before).abs().max() > 1e-3
    lora.merge()
    torch.testing.assert_close(model(q, k, v)[0], changed)


def test_only_the_tower_of_an_encoder_is_adapted():
    pytest.importorskip("transformers", reason="transformers is not installed")
    row = next(row for row in ROWS if row.name == "SigLIP, full" and row.library == "transformers")
    model, _ = row.make()
    enc = PatchEncoder(model, projection=5)
    lora = add_lora(enc, rank=2)
    assert all("vision" in site and "head" not in site for site in lora.sites)
    assert enc.projection.weight.requires_grad
    assert not any(p.requires_grad for n, p in enc.model.named_parameters() if "parametrizations" not in n)
    lora.remove()
    everything = add_lora(model, rank=2)
    assert any("text" in site for site in everything.sites) and any("head" in site for site in everything.sites)


def test_what_was_frozen_stays_frozen():
    model = nn.Sequential(Attention(), nn.Linear(24, 2))
    model[1].weight.requires_grad_(False)
    lora = add_lora(model, rank=1)
    assert not any(p.requires_grad for p in model[1].parameters())
    lora.merge()
    assert model[0].qkv.weight.requires_grad and model[1].bias.requires_grad and not model[1].weight.requires_grad


def test_a_step_of_an_optimiser_changes_only_the_factors():
    torch.manual_seed(0)
    model = Attention()
    weight = model.qkv.weight.detach().clone()
    lora = add_lora(model, rank=2)
    optimiser = torch.optim.SGD(lora.parameters(), 0.5)
    x = torch.randn(4, 8)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    lora.remove()
    assert torch.equal(model.qkv.weight, weight)


def test_a_half_precision_base_gets_float32_factors():
    model = Attention().to(torch.bfloat16)
    lora = add_lora(model, rank=2)
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_deepcopy_and_compile():
    torch.manual_seed(0)
    model = Attention()
    lora = add_lora(model, rank=2)
    stir(lora)
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_state_dict_errors_change_nothing():
    lora = add_lora(Attention(), rank=2)
    state = {k: v.clone() + 1 for k, v in lora.state_dict().items()}
    before = {k: v.clone() for k, v in lora.state_dict().items()}
    short = {k: v for k, v in state.items() if not k.endswith("q.a")}
    with pytest.raises(ValueError, match=r"state: 1 missing keys \(first: \['qkv.weight:q.a'\]\) and 0 unknown"):
        lora.load_state_dict(short)
    with pytest.raises(ValueError, match=r"1 unknown ones .first: .'extra'"):
        lora.load_state_dict({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"state: qkv.weight:v.b must be \(8, 2\), got \(2, 8\)"):
        lora.load_state_dict({**state, "qkv.weight:v.b": torch.zeros(2, 8)})
    assert all(torch.equal(v, before[k]) for k, v in lora.state_dict().items())
    lora.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in lora.state_dict().items())


def test_an_optimiser_s_state_fits_after_removal():
    model = nn.Sequential(Attention(fused=False), nn.Linear(24, 8))
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimiser.step()
    saved = optimiser.state_dict()
    add_lora(model, rank=2).remove()
    again = torch.optim.Adam(model.parameters(), 0.1)
    again.load_state_dict(saved)
    for group in again.param_groups:
        for parameter in group["params"]:
            assert again.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (
            nn.Linear(4, 4),
            {},
            ValueError,
            r"no attention with targets \('q', 'v'\) found in Linear: looked for fused 'qkv'",
        ),
        ("vit", {}, TypeError, "model must be an nn.Module or a PatchEncoder, got str"),
        (Attention(), {"rank": 0}, ValueError, "rank must be an int >= 1, got 0"),
        (Attention(), {"rank": True}, ValueError, "rank must be an int >= 1, got True"),
        (Attention(), {"rank": 9}, ValueError, r"rank must be at most 8 for qkv.weight \(24, 8\), got 9"),
        (Attention(), {"alpha": 0}, ValueError, "alpha must be a number > 0, got 0"),
        (Attention(), {"alpha": float("nan")}, ValueError, "alpha must be a number > 0, got nan"),
        (Attention(), {"targets": ()}, ValueError, "targets must be distinct names out of"),
        (Attention(), {"targets": ("q", "o")}, ValueError, "targets must be distinct names out of"),
        (Attention(), {"targets": ("q", "q")}, ValueError, "targets must be distinct names out of"),
        (PatchEncoder(lambda x: x, n_prefix=0), {}, TypeError, "wraps a plain callable"),
    ],
)
def test_bad_arguments(model, options, error, text):
    with pytest.raises(error, match=text):
        add_lora(model, **options)


def test_uneven_and_quantised_weights_are_refused():
    uneven = nn.Module()
    uneven.qkv = nn.Linear(4, 10)
    with pytest.raises(ValueError, match=r"qkv.weight has 10 rows, which do not split into q, k and v"):
        add_lora(uneven, rank=1)
    quantised = nn.Module()
    quantised.qkv = nn.Linear(4, 12)
    quantised.qkv.weight = nn.Parameter(torch.zeros(12, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"qkv.weight holds torch.int8; .* not quantised ones"):
        add_lora(quantised, rank=1)


def test_twice_is_refused_and_a_failure_freezes_nothing():
    model = nn.Sequential(Attention(), nn.Linear(24, 8), Attention(4))
    with pytest.raises(ValueError, match="rank must be at most 4"):
        add_lora(model, rank=6)
    assert all(p.requires_grad for p in model.parameters())
    lora = add_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"0.qkv.weight is parametrised already .*merge\(\) or remove\(\)"):
        add_lora(model, rank=2)
    lora.merge()
    with pytest.raises(RuntimeError, match="merged or removed already"):
        lora.merge()
    with pytest.raises(RuntimeError, match="merged or removed already"):
        list(lora.parameters())
    assert len(add_lora(model, rank=2).sites) == 2


def test_repr():
    lora = add_lora(Attention(), rank=2)
    assert repr(lora) == "LoRA(1 weights, rank=2, alpha=16, targets=('q', 'v'), 64 parameters)"
    lora.merge()
    assert "merged or removed" in repr(lora)
