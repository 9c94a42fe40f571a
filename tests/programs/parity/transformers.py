import importlib
from pathlib import Path

import torch
import transformers
from parity.common import same, tried, unit
from parity.retrieval import compare_retrieval

import latemax.compat
from latemax.compat import transformers as ours
from latemax.compat._targets import HOSTS


def processors():
    for target in HOSTS["transformers"].targets:
        yield getattr(importlib.import_module(target.module), target.name.split(".")[0])


def check_score_retrieval():
    for processor in processors():
        name = f"{processor.__name__}.score_retrieval"
        compare_retrieval(name, lambda *a, own=processor.score_retrieval, **k: own(None, *a, **k), ours.score_retrieval)


def check_every_retriever_is_known():
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/*.py"):
        if "def score_retrieval" in path.read_text() and not path.stem.startswith("modular_"):
            found.add(f"transformers.models.{path.parent.name}.{path.stem}")
    assert found == {target.module for target in HOSTS["transformers"].targets}
    tried["retrievers"] += len(found)


def check_patch():
    q, d = unit(2, 3, 8), unit(4, 5, 8)
    own = {processor: processor.score_retrieval for processor in processors()}
    with latemax.compat.patch("transformers"):
        for processor, original in own.items():
            assert processor.score_retrieval is not original
            same(
                object.__new__(processor).score_retrieval(q, d, output_dtype=torch.float64),
                original(None, q, d).double(),
            )
            tried["patch"] += 1
    assert all(processor.score_retrieval is original for processor, original in own.items())
