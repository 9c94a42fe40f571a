"""A numpy array is taken wherever a CPU tensor is: the same memory, the same result, bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import latemax
from latemax import analysis
from latemax.arguments import arrays
from latemax.ops import operator
from latemax.ops.backends import native

FLOATS = [np.float16, np.float32, np.float64]


def draw(*shape: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(ours, theirs) -> None:
    ours, theirs = ([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    assert all(isinstance(x, torch.Tensor) and torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def tensors(x):
    if isinstance(x, (list, tuple)):
        return [tensors(item) for item in x]
    return x if x is None else torch.from_numpy(x)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: x.__name__)
def test_every_function_takes_arrays(dtype):
    q, d = draw(3, 5, 16, dtype=dtype), draw(4, 9, 16, dtype=dtype, seed=1)
    q_mask, d_mask = draw(3, 5, seed=2) > -1, (draw(4, 9, seed=3) > -1).astype(np.float32)
    ours = latemax.maxsim(q, d, q_mask, d_mask, return_argmax=True)
    same(ours, latemax.maxsim(*tensors([q, d, q_mask, d_mask]), return_argmax=True))
    same(latemax.maxsim(q, d), latemax.maxsim(*tensors([q, d])))
    same(latemax.maxsim(q[0], torch.from_numpy(d)), latemax.maxsim(*tensors([q[0], d])))
    same(latemax.maxsim_pairs(q, d[:3], q_mask), latemax.maxsim_pairs(*tensors([q, d[:3], q_mask])))
    same(latemax.MaxSim()(q, d), latemax.maxsim(*tensors([q, d])))
    assert latemax.explain(q, d) == latemax.explain(*tensors([q, d]))
    flat = q.reshape(15, 16), d.reshape(36, 16), np.array([0, 5, 15], np.int32), np.array([0, 9, 9, 36])
    same(latemax.maxsim_varlen(*flat), latemax.maxsim_varlen(*tensors(flat)))
    packed = q, flat[1], flat[3], np.array([[0, 2], [1, -1], [2, 2]])
    same(latemax.rerank(*packed, q_mask), latemax.rerank(*tensors([*packed, q_mask])))


def test_plain_arrays_are_taken_at_once():
    x = [draw(3, 4), draw(2, 4)]
    assert [t.data_ptr() for t in arrays.plain_as_tensors(x)] == [item.ctypes.data for item in x]
    read_only = draw(3, 4)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for odd in (read_only, draw(3, 4)[::-1], draw(3, 4).astype(">f4"), np.ma.array(draw(3, 4)), torch.ones(3, 4)):
            assert arrays.plain_as_tensors([x[0], odd]) is None


@pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
def test_lists_of_arrays_are_read_where_they_are(monkeypatch):
    q, d = draw(2, 3, 4), [draw(3, 4), draw(0, 4), draw(8, 4)[::2], draw(5, 1).repeat(4, 1)]
    d[0].flags.writeable = False
    expected = latemax.maxsim(torch.from_numpy(q), [torch.from_numpy(x.copy()) for x in d])
    table, offsets = native.read_items(d, arrays=True)
    assert table[[0, 2, 3], 0].tolist() == [x.ctypes.data for x in d if len(x)]
    assert table[[0, 2, 3], 2].tolist() == [4, 8, 4] and offsets.tolist() == [0, 3, 3, 7, 12]
    odd = (draw(3, 4)[::-1], draw(4, 3).T, draw(3, 4).astype(">f4"), draw(3, 4, dtype=np.float64), draw(3, 5), draw(3))
    for x in odd:
        assert native.read_items([d[0], x], arrays=True) is None
    monkeypatch.setattr(arrays, "all_as_tensors", None)  # no other item becomes a tensor
    assert torch.equal(latemax.maxsim(q, d), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: x.__name__)
def test_lists_of_arrays(dtype):
    q, d = ([draw(n, 16, dtype=dtype, seed=n) for n in lengths] for lengths in ((3, 1), (5, 0, 130)))
    masks = [np.array([1, 0, 1]), None], [None, np.zeros(0, bool), draw(130, seed=4) > 0]
    ours = latemax.maxsim(q, d, *masks, return_argmax=True)
    same(ours, latemax.maxsim(tensors(q), tensors(d), *tensors(masks), return_argmax=True))
    same(latemax.maxsim(q, [torch.from_numpy(d[0]), *d[1:]]), latemax.maxsim(tensors(q), tensors(d)))
    candidates = np.array([[2, 0], [1, -1]])
    same(latemax.rerank(q, d, None, candidates), latemax.rerank(*tensors([q, d, None, candidates])))


def test_search_and_stores_take_arrays(tmp_path):
    q, d = draw(2, 4, 16), draw(6, 5, 16, seed=1)
    masks = draw(2, 4, seed=2) > -1, draw(6, 5, seed=3) > -1
    flat = d.reshape(30, 16), np.arange(7) * 5
    same(latemax.topk(q, d, 3, masks[0], d_mask=masks[1]), latemax.topk(*tensors([q, d]), 3, *tensors(masks[:1]),
                                                                      d_mask=tensors(masks[1])))  # fmt: skip
    expected = latemax.topk(*tensors([q, d]), 3)
    with latemax.StoreWriter(tmp_path) as writer:
        writer.add(d[0][::-1])
        writer.replace(d[0], 0)
        writer.add_packed(flat[0][5:], flat[1][1:] - 5)
    for corpus in (d, list(d), tuple(d), flat, latemax.PatchStore(tmp_path)):
        same(latemax.topk(q, corpus, 3), expected)
        same(latemax.topk(list(q), corpus, 3), expected)
        same(latemax.two_stage(q, corpus, 3, latemax.MeanPool(corpus)), expected)
    # as faiss answers
    same(latemax.two_stage(q, d, 3, lambda *_: np.arange(12).reshape(2, 6) % 6), expected)
    assert latemax.first_stage_recall(q, d, 3, latemax.MeanPool(d)).mean == 1


def test_analysis_takes_arrays():
    q, d, groups = draw(4, 16), draw(7, 16, seed=1), analysis.token_groups(6)
    ours, theirs = (analysis.argmax_share(*x, groups) for x in ([q, d], tensors([q, d])))
    same((ours.wins, ours.score), (theirs.wins, theirs.score))
    ours, theirs = (analysis.similarity_distribution(*x, groups).raw for x in ([q, d], tensors([q, d])))
    same(tuple(ours.values()), tuple(theirs.values()))
    ours, theirs = (analysis.grounding_map(*x, (2, 3)) for x in ([q, d[1:]], tensors([q, d[1:]])))
    same((ours.map, ours.score), (theirs.map, theirs.score))
    ours, theirs = (analysis.token_norms(x[None], groups=groups).before for x in (d, tensors(d)))
    same(tuple(ours.values()), tuple(theirs.values()))


def test_bfloat16_is_known_by_its_name():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, d = draw(2, 5, 16), draw(3, 9, 16, seed=1)
    expected = latemax.maxsim(*(torch.from_numpy(x).bfloat16() for x in (q, d)), return_argmax=True)
    q, d = q.astype(ml_dtypes.bfloat16), d.astype(ml_dtypes.bfloat16)
    same(latemax.maxsim(q, d, return_argmax=True), expected)
    same(latemax.maxsim(q, list(d), return_argmax=True), expected)
    with pytest.raises(TypeError, match="q must be an array of a dtype that torch has, got float8_e4m3fn"):
        latemax.maxsim(q.astype(ml_dtypes.float8_e4m3fn), d)


def views() -> dict[str, np.ndarray]:
    x = draw(40, 24)
    fields = np.zeros(40, np.dtype([("id", "u1"), ("token", np.float32, 24)]))
    fields["token"] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    return {
        "rows from last to first": x[::-1],
        "dims from last to first": x[:, ::-1],
        "every second": x[::2, ::2],
        "transposed": draw(24, 40).T,
        "broadcast": np.broadcast_to(x[:1], (7, 24)),
        "a field of records, 97 bytes apart": fields["token"],
        "read-only": read_only,
        "empty": x[:0],
    }


COPIED = ("rows from last to first", "dims from last to first", "a field of records, 97 bytes apart")


@pytest.mark.parametrize("name", views())
def test_views(name):
    x, q = views()[name], draw(3, views()[name].shape[1], seed=1)
    tensor = arrays.as_tensor("x", x)
    assert tensor.shape == x.shape
    if x.size:
        assert (tensor.data_ptr() == x.__array_interface__["data"][0]) == (name not in COPIED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = latemax.maxsim(q, [x, x[:1]], return_argmax=True)
    same(ours, latemax.maxsim(torch.tensor(q), [torch.tensor(y.copy()) for y in (x, x[:1])], return_argmax=True))


def test_a_memory_map_is_used_where_it_is(tmp_path):
    np.save(tmp_path / "tokens.npy", draw(36, 16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    tensor = arrays.as_tensor("tokens", mapped)
    address = mapped.__array_interface__["data"][0]
    del mapped
    assert tensor.data_ptr() == address and torch.equal(tensor, torch.from_numpy(draw(36, 16)))


@pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
def test_arrays_of_a_list_are_scored_where_they_are(monkeypatch):
    d = [draw(n, 16, seed=n) for n in (5, 3)]
    seen = []
    real = operator.maxsim
    monkeypatch.setattr(operator, "maxsim", lambda b, *rest: seen.append(b) or real(b, *rest))
    latemax.maxsim(draw(2, 3, 16), d)
    assert seen[0].d.separate.table[:, 0].tolist() == [x.__array_interface__["data"][0] for x in d]


def test_a_tensor_next_to_an_array_gets_its_gradient():
    q, d = torch.randn(2, 5, 16, requires_grad=True), draw(3, 9, 16)
    (ours,) = torch.autograd.grad(latemax.maxsim(q, d).sum(), q)
    (expected,) = torch.autograd.grad(latemax.maxsim(q, torch.from_numpy(d)).sum(), q)
    assert torch.equal(ours, expected)


REFUSED = {
    "q must be in the byte order of this machine, got dtype": lambda x: x.astype(x.dtype.newbyteorder()),
    "q must be an array of a dtype that torch has, got object": lambda x: x.astype(object),
    "q must be an array of a dtype that torch has, got <U": lambda x: x.astype(str),
    "q must be a plain array, got a masked array": lambda x: np.ma.masked_array(x, x > 0),
    r"q must be float16, bfloat16, float32 or float64, got torch\.int8": lambda x: x.astype(np.int8),
    r"q must be float16, bfloat16, float32 or float64, got torch\.uint16": lambda x: x.astype(np.uint16),
    r"q must be float16, bfloat16, float32 or float64, got torch\.bool": lambda x: x > 0,
    r"q must be float16, bfloat16, float32 or float64, got torch\.complex64": lambda x: x.astype(np.complex64),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_arrays_are_refused(message):
    d = draw(3, 9, 16)
    wrong = REFUSED[message](draw(5, 16))
    with pytest.raises(TypeError, match=message):
        latemax.maxsim(wrong, d)
    with pytest.raises(TypeError, match=message.replace("q must", r"q\[1\] must", 1)):
        latemax.maxsim([draw(2, 16), wrong], d)


def test_other_arguments_are_refused_by_name():
    q, d = draw(5, 16), draw(3, 9, 16)
    with pytest.raises(TypeError, match="d_mask must be a plain array, got a masked array"):
        latemax.maxsim(q, d, None, np.ma.masked_array(d[..., 0] > 0))
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be int32 or int64, got torch.float64"):
        latemax.maxsim_varlen(q, d[0], np.array([0.0, 5.0]), np.array([0, 9]))
    with pytest.raises(TypeError, match=r"candidates must be a torch.Tensor or a numpy array, got list"):
        latemax.rerank(q, d[0], np.array([0, 9]), [0])
    with pytest.raises(ValueError, match=r"q must be \[l_q, dim\] or \[n_q, l_q, dim\], got shape \[\]"):
        latemax.maxsim(np.array(1.0), d)
    with pytest.raises(TypeError, match=r"d must be a torch.Tensor, a numpy array or a list of them, got float"):
        latemax.maxsim(q, 1.0)
