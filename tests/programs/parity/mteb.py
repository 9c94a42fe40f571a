import torch
from hypothesis import strategies as st
from mteb import similarity_functions as host
from parity.common import cases, cast, compare, items_of, side, tried

import latemax.compat
from latemax.compat import mteb as ours

# Zero rows and integers differ: zero rows of tensors are padding to exact, and mteb scores integers in integers.
FORMS = ("tensor", "list", "numpy", "arrays", "nested", "one")
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@cases(a=side(forms=FORMS), b=side(forms=FORMS, longest=9), dtype=DTYPES, size=st.sampled_from([1, 2, 128]))
def check_max_sim(a, b, dtype, size):
    a, b = cast(a[0], dtype), cast(b[0], dtype)
    compare("max_sim", lambda: host.max_sim(a, b, size), lambda: ours.max_sim(a, b, size, padding="host"))

    def one_by_one():  # nothing is padded, and both rules agree
        return torch.cat([host.max_sim(a, d[None], size) for d in items_of(b)], dim=1)

    compare("max_sim, exact", one_by_one, lambda: ours.max_sim(a, b, size))


def check_max_sim_in_groups():
    # one long document: mteb pads groups of similar length, of 10,000 tokens
    for longest in (2000, 12000):
        a, b = [torch.randn(3, 8)] * 2, [torch.randn(n, 8) - 5 for n in (1, 2, 2, 3, longest)]
        a[1] = a[1].abs()
        compare("max_sim", lambda: host.max_sim(a, b), lambda: ours.max_sim(a, b, padding="host"), tolerance=1e-3)


@cases(data=st.data(), n=st.integers(1, 5), dtype=DTYPES)
def check_pairwise_max_sim(data, n, dtype):
    a, b = (cast(data.draw(side(n=n, forms=FORMS[:5]))[0], dtype) for _ in "ab")
    for padding in ("exact", "host"):
        compare(
            "pairwise_max_sim",
            lambda: host.pairwise_max_sim(a, b),
            lambda: ours.pairwise_max_sim(a, b, padding=padding),
        )


def check_patch():
    from mteb.models import abs_encoder

    own, a = host.max_sim, torch.randn(2, 3, 8)
    with latemax.compat.patch("mteb"):
        assert abs_encoder.max_sim is host.max_sim is not own
        torch.testing.assert_close(abs_encoder.max_sim(a, a), own(a, a))
    assert abs_encoder.max_sim is host.max_sim is own
    tried["patch"] += 1
