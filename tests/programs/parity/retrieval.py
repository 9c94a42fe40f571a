"""The retrieval scores that colpali-engine and transformers share."""

import torch
from hypothesis import strategies as st
from parity.common import TOLERANCE, cases, cast, compare, items_of, side

FORMS = ("tensor", "list")
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def compare_retrieval(name, host, ours):
    sizes = st.sampled_from([1, 2, 3, 128])

    @cases(
        q=side(forms=FORMS), d=side(forms=(*FORMS, "zeros"), longest=9), dtype=DTYPES, size=sizes,
        empty=st.sampled_from([""] * 6 + ["q", "d"]),
    )  # fmt: skip
    def check(q, d, dtype, size, empty):
        q, d = ([] if empty == which else cast(x[0], dtype) for which, x in zip("qd", (q, d), strict=True))
        allowed = 2 * TOLERANCE[dtype]
        compare(
            name, lambda: host(q, d, batch_size=size), lambda: ours(q, d, batch_size=size, padding="host"),
            tolerance=allowed,
        )  # fmt: skip
        if isinstance(d, torch.Tensor) and bool((d == 0).all(dim=-1).any()):
            return  # zero rows are padding to exact

        def one_by_one():  # nothing is padded, and both rules agree
            return torch.cat([host(q, [x], batch_size=1) for x in items_of(d)], dim=1)

        compare(f"{name}, exact", one_by_one, lambda: ours(q, d, batch_size=size), tolerance=allowed)

    check()
