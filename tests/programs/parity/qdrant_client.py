import numpy as np
from hypothesis import strategies as st
from parity.common import cases, compare, side, tried
from qdrant_client import QdrantClient, models
from qdrant_client.local import multi_distances as host

import latemax.compat
from latemax.compat import qdrant_client as ours

KINDS = [np.float32, np.float64]


@cases(q=side(n=1, forms=("arrays",)), d=side(forms=("arrays",)), kinds=st.tuples(*[st.sampled_from(KINDS)] * 2))
def check_scores(q, d, kinds):
    query, points = q[0][0].astype(kinds[0]), [x.astype(kinds[1]) for x in d[0]]
    for distance in models.Distance:
        for padding in ("exact", "host"):
            compare(
                "calculate_multi_distance_core",
                # the host normalizes points in place
                lambda: host.calculate_multi_distance_core(query, [x.copy() for x in points], distance),
                lambda: ours.calculate_multi_distance_core(query, points, distance, padding=padding),
            )


def check_client():
    """Every query of a local collection that scores multivectors, with and without latemax."""
    client, random = QdrantClient(":memory:"), np.random.default_rng(0)
    multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    for distance in models.Distance:
        name = distance.value
        params = models.VectorParams(size=8, distance=distance, multivector_config=multi)
        client.create_collection(name, vectors_config=params)
        matrices = [random.normal(size=(random.integers(1, 6), 8)).tolist() for _ in range(40)]
        client.upsert(name, [models.PointStruct(id=i, vector=x) for i, x in enumerate(matrices)])
        near, far = (random.normal(size=(3, 8)).tolist() for _ in range(2))
        queries = {
            "nearest": near,
            "recommend": models.RecommendQuery(
                recommend=models.RecommendInput(
                    positive=[near], negative=[far], strategy=models.RecommendStrategy.BEST_SCORE
                )
            ),
            "discover": models.DiscoverQuery(
                discover=models.DiscoverInput(target=near, context=[models.ContextPair(positive=near, negative=far)])
            ),
            "context": models.ContextQuery(context=[models.ContextPair(positive=near, negative=far)]),
        }
        for kind, query in queries.items():

            def search(query=query, name=name):
                found = client.query_points(name, query, limit=10).points
                return np.array([[point.id, point.score] for point in found])

            wanted = search()
            with latemax.compat.patch("qdrant_client"):
                got = search()
            assert wanted[:, 0].tolist() == got[:, 0].tolist(), (distance, kind)
            np.testing.assert_allclose(got[:, 1], wanted[:, 1], rtol=1e-5, atol=1e-5)
            tried["query_points"] += 1
