import tempfile

import lancedb
import numpy as np
import pyarrow as pa
import torch
from lancedb.index import FTS
from parity.common import tried

from latemax.compat import lancedb as ours


def check_scan_and_reranker():
    random = np.random.default_rng(0)
    for kind in (pa.float32(), pa.float16()):
        documents = [random.normal(size=(random.integers(1, 7), 8)).astype(kind.to_pandas_dtype()) for _ in range(300)]
        column = pa.array([x.tolist() for x in documents], pa.list_(pa.list_(pa.float32(), 8))).cast(
            pa.list_(pa.list_(kind, 8))
        )
        text = ["a red bus" if i % 3 else "a blue car" for i in range(300)]
        with tempfile.TemporaryDirectory() as folder:
            rows = pa.table({"id": range(300), "text": text, "vector": column})
            table = lancedb.connect(folder).create_table("pages", rows)
            table.create_index("text", config=FTS())
            for _ in range(10):
                query = random.normal(size=(random.integers(1, 6), 8)).astype(np.float32)
                search = table.search(query).distance_type("cosine").limit(10)
                wanted = search.to_arrow()
                scores = len(query) - wanted["_distance"].to_numpy()
                batches = table.search().limit(300).to_batches(50)
                for found in (ours.scan(table.to_arrow(), query), ours.scan(batches, query)):
                    # LanceDB sums float16 in half precision: close scores change places
                    assert kind == pa.float16() or found["id"].to_pylist() == wanted["id"].to_pylist()
                    np.testing.assert_allclose(found["_relevance_score"].to_numpy(), scores, atol=1e-3)
                    tried["scan"] += 1
                reranked = search.rerank(ours.maxsim_reranker(query), query_string="").to_arrow()
                assert {*reranked["id"].to_pylist()} == {*wanted["id"].to_pylist()}
                assert reranked.column_names == ["id", "text", "vector", "_relevance_score"]
                every = ours.scores(query, table.to_arrow()["vector"])
                for score in ("relevance", "all"):
                    reranker = ours.maxsim_reranker(lambda text: query, return_score=score)
                    hybrid = table.search(query_type="hybrid").vector(query).text("red").distance_type("cosine")
                    for search in (hybrid, table.search("red", query_type="fts")):
                        found = search.limit(8).rerank(reranker).to_arrow()
                        own = every[found["id"].to_pylist()]
                        np.testing.assert_allclose(found["_relevance_score"].to_numpy(), own, rtol=1e-6)
                        assert torch.equal(own, own.sort(descending=True).values)
                        assert ("_score" in found.column_names) == (score == "all")
                        tried["maxsim_reranker"] += 1
                    if score == "all":
                        words = table.search("red", query_type="fts").limit(300).to_arrow()
                        known = dict(zip(words["id"].to_pylist(), words["_score"].to_pylist(), strict=True))
                        found = hybrid.limit(8).rerank(reranker).to_arrow()
                        assert set(found["_score"].to_pylist()) - {None} <= set(known.values())
