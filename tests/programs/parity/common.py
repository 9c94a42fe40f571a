"""What the parity checks share: inputs made by hypothesis, comparison, gradients, a few steps of training."""

from __future__ import annotations

import collections
import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

CASES = int(os.environ.get("LATEMAX_HOST_CASES", "25"))
# check -> results compared; inputs that the host raises for
tried: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()
# explanation -> results that differ from the host's, and were compared with what the explanation says instead
differs: collections.Counter[str] = collections.Counter()
MASKED_NAN = "a masked token with NaN: no influence; the host's score is NaN"
TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}

FORMS = ("tensor", "list", "numpy", "arrays", "nested", "int", "zeros", "one")


def cases(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Runs a check on CASES examples, the same in every run."""
    quiet = settings(
        max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck]
    )
    return lambda check: quiet(given(**strategies)(check))


@st.composite
def side(
    draw: st.DrawFn, dim: int = 8, n: int | None = None, forms: Sequence[str] = FORMS, longest: int = 6
) -> tuple[Any, list[int]]:
    """Tokens in a form, and the length of every item: [n, longest, dim], or a list of [l_i, dim]."""
    form = draw(st.sampled_from(forms))
    n = 1 if form == "one" else draw(st.integers(1, 5)) if n is None else n
    torch.manual_seed(draw(st.integers(0, 2**16)))
    ragged = form in ("list", "arrays")
    lengths = [draw(st.integers(1, longest)) if ragged else longest for _ in range(n)]
    items = [torch.randn(length, dim) for length in lengths]
    if form == "zeros":  # padding, for hosts to which zero rows are
        items = [item * (torch.rand(len(item), 1) < 0.6) for item in items]
    if form == "int":
        items = [(item * 5).to(torch.int8) for item in items]
    if draw(st.sampled_from([False, False, False, True])) and form != "int":
        items[-1][0, 0] = math.nan
    if form == "list":
        return items, lengths
    if form == "arrays":
        return [item.numpy() for item in items], lengths
    if form == "one":
        return items[0], lengths
    x = torch.stack(items)
    return {"numpy": lambda: x.numpy(), "nested": lambda: x.tolist()}.get(form, lambda: x)(), lengths


@st.composite
def mask(draw: st.DrawFn, lengths: list[int], forms: Sequence[str], *, weights: bool = False) -> Any:
    """None, or a mask [n, longest] that is 0 in the padding, in a form."""
    form = draw(st.sampled_from(["none", *forms]))
    if form == "none":
        return None
    x = (torch.rand(len(lengths), max(lengths)) < 0.7).float()
    if form == "empty":
        x[0] = 0
    if form == "weights" and weights:
        x = x * torch.rand(x.shape)
    x *= torch.arange(x.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    made = {"bool": lambda: x.bool(), "int": lambda: x.int(), "numpy": lambda: x.numpy(), "list": lambda: [*x]}
    return made.get(form, lambda: x)()


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Tensors and lists of tensors in a dtype; all else as it is."""
    if isinstance(x, list):
        return [cast(item, dtype) for item in x]
    return x.to(dtype) if isinstance(x, Tensor) else x


def without_masked_nan(x: Any, keep: Any) -> tuple[Any, bool]:
    """Tokens with 0 for the NaN that ``side`` made, if the mask excludes it, and whether it does."""
    single = getattr(x, "ndim", 3) == 2
    if keep is None or float((keep if single else keep[-1])[0]) != 0:
        return x, False
    x = copy.deepcopy(x)
    token = (x if single else x[-1])[0]
    if not math.isnan(token[0]):
        return x, False
    token[0] = 0.0
    return x, True


def items_of(x: Any) -> list[Any]:
    """Single documents, in their own form where they have one."""
    return [x] if getattr(x, "ndim", 3) == 2 else [torch.tensor(item) if isinstance(item, list) else item for item in x]


def compare(
    check: str, host: Callable[[], Any], ours: Callable[[], Any], *, dtype: bool = True, tolerance: float | None = None
) -> None:
    """Ours equals the host's. Where the host raises, ours may give a result, or refuse with a clear error."""
    try:
        wanted = host()
    except Exception:
        refused[check] += 1
        try:
            ours()
        except (TypeError, ValueError, RuntimeError) as error:
            assert str(error)
        return
    tried[check] += 1
    same(ours(), wanted, dtype=dtype, tolerance=tolerance)


def same(ours: Any, host: Any, *, dtype: bool = True, tolerance: float | None = None) -> None:
    if not isinstance(host, Tensor):
        assert type(ours) is type(host), (type(ours), type(host))
        ours, host = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(host))
    assert ours.shape == host.shape, (ours.shape, host.shape)
    assert ours.device == host.device, (ours.device, host.device)
    assert not dtype or ours.dtype == host.dtype, (ours.dtype, host.dtype)
    allowed = TOLERANCE[host.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(ours.double(), host.double(), atol=allowed, rtol=allowed, equal_nan=True)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    scores = function(*leaves)
    weights = torch.linspace(1, 2, scores.numel(), dtype=scores.dtype).view_as(scores)
    return torch.autograd.grad((scores * weights).sum(), leaves)


def compare_gradients(check: str, host: Callable[..., Tensor], ours: Callable[..., Tensor], *inputs: Tensor) -> None:
    for wanted, got in zip(gradients(host, *inputs), gradients(ours, *inputs), strict=True):
        tried[check] += 1
        same(got, wanted)


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def losses_of(model: torch.nn.Module, loss: Callable[[], Tensor], steps: int = 5) -> list[float]:
    """The losses of a few steps of training, from and back to the weights that the model has now."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        found.append(value.item())
    model.load_state_dict(before)
    return found


def compare_training(
    check: str, model: torch.nn.Module, host: Callable[[], Tensor], ours: Callable[[], Tensor]
) -> None:
    wanted = losses_of(model, host)
    assert wanted[0] != wanted[-1], "the model does not learn"
    tried[check] += len(wanted)
    torch.testing.assert_close(losses_of(model, ours), wanted, atol=1e-4, rtol=1e-4)


WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK] [Q] [D]".split(), *"a red blue bus car cat dog fast slow old new .".split()]
TEXTS = ("a red bus", "blue car", "old cat fast", "a new slow dog"), ("a fast red bus .", "car", "a cat", "dog old")


def tiny_bert(folder: str) -> str:
    """A random BERT and its tokenizer, saved in the folder."""
    from pathlib import Path

    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = Path(folder) / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder
