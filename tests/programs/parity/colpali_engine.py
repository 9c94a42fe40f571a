import torch
from colpali_engine.loss import late_interaction_losses as losses
from colpali_engine.utils import maxsim as host
from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor as Processor
from hypothesis import strategies as st
from parity.common import (
    cases,
    compare,
    compare_gradients,
    compare_training,
    gradients,
    same,
    tried,
    unit,
)
from parity.retrieval import compare_retrieval

import latemax.compat
from latemax.compat import colpali_engine as ours


def check_score_multi_vector():
    compare_retrieval("score_multi_vector", Processor.score_multi_vector, ours.score_multi_vector)


@cases(seed=st.integers(0, 2**16), dim=st.integers(1, 33), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def check_loss_scores(seed, dim, dtype):
    torch.manual_seed(seed)
    q, d, own = (torch.randn(*shape, dim).to(dtype) for shape in ((3, 4), (5, 6), (3, 2, 5)))
    d[0, 3:] = 0
    compare("maxsim_inbatch", lambda: host.maxsim_inbatch(q, d), lambda: ours.maxsim_inbatch(q, d, padding="host"))
    compare("maxsim_kd", lambda: host.maxsim_kd(q, own), lambda: ours.maxsim_kd(q, own, padding="host"))
    # without padding, and without zeros, exact is the same
    short = d[1:]
    compare(
        "maxsim_inbatch, exact",
        lambda: host.maxsim_inbatch(q, short),
        lambda: ours.maxsim_inbatch(q, short),
        dtype=False,
    )
    if dtype == torch.float32:
        compare_gradients("gradients", host.maxsim_inbatch, ours.maxsim_inbatch, q, short)
        compare_gradients("gradients", host.maxsim_kd, ours.maxsim_kd, q, own)


LOSSES = (
    losses.ColbertLoss,
    losses.ColbertNegativeCELoss,
    losses.ColbertPairwiseCELoss,
    losses.ColbertPairwiseNegativeCELoss,
    losses.ColbertSigmoidLoss,
)
OPTIONS = (
    {},
    {"normalize_scores": False},
    {"use_smooth_max": True},
    {"use_smooth_max": True, "normalize_scores": False, "tau": 0.02, "pos_aware_negative_filtering": True},
    {"pos_aware_negative_filtering": True},
    {"in_batch_term_weight": 0.0},
)


def check_smooth_losses_call_latemax():
    """No smooth maximum of any loss is left to the host."""

    def refused(*_, **__):
        raise AssertionError("the host computed a smooth maximum")

    for loss in LOSSES:
        made = loss(use_smooth_max=True)
        made._smooth_max = refused
        for part in made.children():
            part._smooth_max = refused
        q, d, negatives = unit(4, 5, 8), unit(4, 6, 8), unit(4, 3, 7, 8)
        with latemax.compat.patch("colpali_engine"):
            made(*((q, d, negatives) if "Negative" in loss.__name__ else (q, d)))
        tried["smooth maxima"] += 1


def check_losses():
    """Every loss with every option, value and gradients; both paddings, since no row is zero."""
    for loss in LOSSES:
        explicit = "Negative" in loss.__name__
        for options in OPTIONS if explicit else OPTIONS[:5]:
            q, d, negatives = unit(4, 5, 8), unit(4, 6, 8), unit(4, 3, 7, 8)
            inputs = (q, d, negatives) if explicit else (q, d)
            made = loss(**options)
            value, wanted = made(*inputs), gradients(made, *inputs)
            for padding in ("exact", "host"):
                with latemax.compat.patch("colpali_engine", padding=padding):
                    same(made(*inputs), value)
                    for a, b in zip(gradients(made, *inputs), wanted, strict=True):
                        same(a, b)
                tried["losses"] += 1 + len(inputs)


def check_positives_are_exact():
    """A zero row wins against -0.6 in the host; exact treats it as padding, in positives as in negatives.

    Smooth maxima: the host adds exp(0) for the zero row.
    """
    q = torch.tensor([[[1.0, 0.0]]])
    padded = torch.tensor([[[-0.6, 0.0], [0.0, 0.0]]])
    for loss in (losses.ColbertNegativeCELoss, losses.ColbertPairwiseNegativeCELoss):
        for smooth in (False, True):
            made = loss(in_batch_term_weight=0.0, temperature=1.0, use_smooth_max=smooth)
            plain = made(q, padded[:, :1], padded[:, None, :1])
            assert made(q, padded, padded[:, None, :1]) < plain  # softplus(-0.6 - 0)
            with latemax.compat.patch("colpali_engine"):
                same(made(q, padded, padded[:, None, :1]), plain)
            tried["losses"] += 1


def check_training():
    from colpali_engine.models import ColQwen2
    from transformers.models.qwen2_vl import Qwen2VLConfig

    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=32),
    )  # fmt: skip
    model = ColQwen2(config)
    ids, mask = torch.randint(0, 30, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    mask[0, :3] = 0  # zero rows: its documents are padded
    loss = losses.ColbertLoss(temperature=1.0, normalize_scores=True)

    def step(padded=mask):
        documents = model(input_ids=ids.flip(0), attention_mask=padded)
        return loss(model(input_ids=ids, attention_mask=mask), documents)

    def patched(padding, padded):
        with latemax.compat.patch("colpali_engine", padding=padding):
            return step(padded)

    compare_training("training", model, step, lambda: patched("host", mask))
    whole = torch.ones_like(mask)
    compare_training("training", model, lambda: step(whole), lambda: patched("exact", whole))


def check_patch():
    original = Processor.score_multi_vector
    q, d = list(unit(2, 3, 8)), list(unit(4, 5, 8))
    with latemax.compat.patch("colpali_engine"):
        assert losses.maxsim_inbatch is host.maxsim_inbatch and Processor.score_multi_vector is not original
        same(Processor.score_multi_vector(q, d), original(q, d))
    assert Processor.score_multi_vector is original
    tried["patch"] += 1
