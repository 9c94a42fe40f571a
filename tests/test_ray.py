"""`latemax.ray` on a real local cluster: workers and actors are killed while they are at work.

`make test-ray` installs Ray and runs this; elsewhere it is skipped.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from encoder_models import save_tiny_dinov2

import latemax
from latemax import PatchStore, StoreWriter, topk
from latemax.cli.index import index

ray = pytest.importorskip("ray", reason="Ray is not installed; make test-ray installs it")
pytest.importorskip("ray.data", reason="what Ray Data needs is not installed; make test-ray installs it")
pytest.importorskip("PIL", reason="images are opened with Pillow")

DIM = 16


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # a session's sockets must fit into 107 characters
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    made = torch.Generator().manual_seed(0)
    folder, number, found = tmp_path_factory.mktemp("stores"), 0, []
    for name, count in (("a", 70), ("b", 0), ("c", 45)):
        with StoreWriter(folder / name, shard_bytes=4000) as writer:
            for _ in range(count):
                writer.add(torch.randn(int(torch.randint(0, 9, (), generator=made)), DIM, generator=made), f"p{number}")
                number += 1
        found.append(PatchStore(folder / name))
    return found


@pytest.fixture(scope="module")
def searcher(stores):
    with latemax.ray.Searcher(stores, num_actors=2, num_cpus=0.5, timeout=60) as made:
        yield made


def queries(n=3):
    return torch.randn(n, 5, DIM, generator=torch.Generator().manual_seed(1))


def same(found, expected):
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.indices, expected.indices)
    assert (found.argmax is None) == (expected.argmax is None)
    assert found.argmax is None or torch.equal(found.argmax, expected.argmax)


def test_a_search_equals_one_process(searcher, stores):
    corpus = [*stores[0], *stores[2]]
    assert len(searcher) == 115 and searcher.place(70)[0] is stores[2] and searcher.place(114)[1] == 44
    q = queries()
    same(searcher.topk(q, 10), topk(q, corpus, 10))
    same(searcher.topk(q[0], 115), topk(q[0], corpus, 115))
    mask = torch.tensor([[1, 1, 0, 1, 1], [1] * 5, [0] * 5])
    options = dict(normalize=True, return_argmax=True, reduce="mean")
    same(searcher.topk(q, 7, mask, **options), topk(q, corpus, 7, mask, **options))
    ragged = [q[0], q[1, :2]]
    same(searcher.topk(ragged, 4, return_argmax=True), topk(ragged, corpus, 4, return_argmax=True))
    chosen = torch.tensor([2, 69, 70, 100])
    same(searcher.topk(q[0].numpy(), 3), topk(q[0], corpus, 3))
    same(searcher.topk(q, 3, within=chosen), topk(q, corpus, 3, within=chosen))
    same(searcher.topk(q, 2, within=["p2", "p100"]), topk(q, corpus, 2, within=torch.tensor([2, 100])))
    same(searcher.topk(q, 1, within=torch.tensor([114])), topk(q, corpus, 1, within=torch.tensor([114])))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s.topk(queries(), 116), ValueError, "k must be at most the number of documents, 115; got 116"),
        (lambda s: s.topk(queries(), 3, within=["p1", "p2"]), ValueError, "documents in within, 2; got 3"),
        (lambda s: s.topk(queries(), 1, within=["nobody"]), ValueError, "within names id 'nobody', which no store has"),
        (lambda s: s.topk(queries()[..., :4], 1), ValueError, "q and corpus must have the same dim; got 4 and 16"),
        (lambda s: s.topk(queries(), 1, device="cuda"), TypeError, "topk of a Searcher takes no device"),
        (lambda s: latemax.ray.Searcher(Path("a")), ValueError, "stores must be a list of at least one"),
        (lambda s: latemax.ray.Searcher([]), ValueError, "stores must be a list of at least one"),
        (lambda s: latemax.ray.Searcher([s.stores[1]]), ValueError, "stores must hold at least one document"),
        (lambda s: latemax.ray.Searcher(s.stores, timeout=0), ValueError, "timeout must be"),
    ],
)
def test_wrong_arguments(searcher, call, error, words):
    with pytest.raises(error, match=words):
        call(searcher)


def test_a_killed_actor_is_replaced_and_the_answer_is_the_same(searcher, stores):
    q, before = queries(), searcher.pids()
    expected = searcher.topk(q, 10)
    # stopped first, so that it is at work when it is killed
    os.kill(before[1], signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (before[1], signal.SIGKILL)).start()
    same(searcher.topk(q, 10), expected)
    after = searcher.pids()
    assert after[0] == before[0] and after[1] != before[1]


def test_a_slow_actor_is_named(searcher, stores):
    expected, stopped = searcher.topk(queries(), 10), searcher.pids()[0]
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(
        TimeoutError, match=rf"no answer within 1 s from actor 0 \(documents 0\.\.\d+ of {stores[0].path}"
    ):
        searcher.topk(queries(), 10, timeout=1.0)
    os.kill(stopped, signal.SIGKILL)
    same(searcher.topk(queries(), 10), expected)


def test_a_generation_stays_until_refresh(tmp_path):
    with StoreWriter(tmp_path) as writer:
        writer.add(torch.ones(2, DIM), "a")
        writer.add(2 * torch.ones(2, DIM), "b")
    with latemax.ray.Searcher([tmp_path], num_actors=1, num_cpus=0.1) as searcher:
        with StoreWriter(tmp_path) as writer:
            writer.add(9 * torch.ones(2, DIM), "c")
        os.kill(searcher.pids()[0], signal.SIGKILL)
        assert searcher.topk(queries().abs(), 1).indices.flatten().tolist() == [1, 1, 1]
        assert searcher.refresh() and searcher.generations == [2]
        assert searcher.topk(queries().abs(), 1).indices.flatten().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="this searcher is closed"):
        searcher.topk(queries(), 1)


# encoding


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers", reason="the encoder is a transformers model")
    return save_tiny_dinov2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("images"), random.Random(0)
    for i in range(60):
        small = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
        small.resize((64, 64)).save(folder / f"{i:02}.png")
    (folder / "30.png").write_bytes(b"no image")
    return str(folder)


def test_a_worker_killed_in_the_middle_changes_nothing(model, images, tmp_path, monkeypatch):
    plain, out = str(tmp_path / "plain"), str(tmp_path / "out")
    index([images], model=model, store=plain)
    expected, killed = PatchStore(plain), []

    def kill():
        while not killed:
            for scratch in Path(out + ".blocks").glob(".*"):
                pid = int(scratch.name.split("-")[1])
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            time.sleep(0.002)

    options = dict(model=model, out=out, num_workers=2, num_cpus=0.5, block=10)
    # the run ends before its last step: nothing is in the store, and all blocks are there
    import latemax.ray.encoding as encoding

    thread = threading.Thread(target=kill)
    thread.start()
    monkeypatch.setattr(encoding, "append", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latemax.ray.encode([images], **options)
    thread.join()
    monkeypatch.undo()
    assert len(PatchStore(out)) == 0
    # a rerun goes on, and with what one block lacks is that one alone made
    blocks = sorted(x for x in Path(out + ".blocks").iterdir() if not x.name.startswith("."))
    assert len(blocks) == 6 and killed
    os.rename(blocks[0], tmp_path / "taken")
    done = latemax.ray.encode([images], **options)
    assert done["blocks"] == {"made": 1, "found": 5} and (done["indexed"], done["already"]) == (59, 0)
    assert [one["path"] for one in done["left_out"]] == [f"{images}/30.png"] and not Path(out + ".blocks").exists()
    store = PatchStore(out)
    store.verify()
    assert store.generation == 1 and store.ids == expected.ids and store.meta == expected.meta
    assert all(torch.equal(x, y) for x, y in zip(store, expected, strict=True))
    assert store.metas() == expected.metas() and store.grid(3) == expected.grid(3)


def test_only_what_is_new_is_encoded_and_wrong_settings_are_refused(model, images, tmp_path):
    out = str(tmp_path / "out")
    first, rest = [f"{images}/{i:02}.png" for i in range(5)], [f"{images}/{i:02}.png" for i in range(3, 9)]
    index(first, model=model, store=out)
    done = latemax.ray.encode(rest, model=model, out=out, num_cpus=0.5)
    assert (done["indexed"], done["already"], done["documents"]) == (4, 2, 9)
    assert PatchStore(out).ids == [f"{images}/{i:02}.png" for i in range(9)]
    again = latemax.ray.encode(rest, model=model, out=out)
    assert (again["indexed"], again["already"], again["blocks"]) == (0, 6, {"made": 0, "found": 0})
    with pytest.raises(ValueError, match="meta must be what"):
        latemax.ray.encode(rest, model=model, out=out, size=28)
    with pytest.raises(ValueError, match="paths must name at least one image"):
        latemax.ray.encode([str(tmp_path)], model=model, out=out)
    with pytest.raises(ValueError, match="num_workers must be"):
        latemax.ray.encode(rest, model=model, out=out, num_workers=0)


def test_a_block_that_kills_every_worker_ends_the_run(model, images, tmp_path):
    from latemax.ray.encoding import Encoder, find_images, settings

    for i in range(4):
        (tmp_path / f".name-{i}-x").mkdir()
    worker = Encoder(str(tmp_path), settings(model, None, None), None, "float16", None, 4, None)
    with pytest.raises(RuntimeError, match=r"4 workers died at one block, .*00\.png to .*59\.png"):
        worker.block("name", find_images([images]).images)
