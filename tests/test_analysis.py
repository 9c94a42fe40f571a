"""``latemax.analysis`` on tokens whose argmax is known by construction."""

import pytest
import torch

from latemax import maxsim
from latemax.analysis import (
    argmax_share,
    convert_axes,
    from_colpali,
    grounding_map,
    own_pairs,
    similarity_distribution,
    simulate_cls_dominance,
    to_colpali,
    token_groups,
    token_norms,
)

INF, NAN = float("inf"), float("nan")
GROUPS = token_groups(3, n_registers=1)  # CLS, one register, three patches


def axis(*which):
    """Unit vectors of a 6-d space, one per row."""
    return torch.eye(6)[list(which)]


@pytest.fixture
def scene():
    """Two queries of two tokens, two documents [CLS, register, p0, p1, p2]; `ARGMAX` is worked out by hand."""
    q = torch.stack([axis(0, 1), axis(2, 3)])
    d0 = torch.stack([3 * axis(0)[0], axis(5)[0], 2 * axis(0)[0], 0.5 * axis(1)[0], axis(2)[0]])
    d1 = torch.stack([axis(4)[0], 4 * axis(3)[0], axis(1)[0], 2 * axis(2)[0], axis(3)[0]])
    return q, torch.stack([d0, d1])


# Raw dot products; ties go to the lowest index. [query, document, token]
ARGMAX = [[[0, 3], [0, 2]], [[4, 0], [3, 1]]]


def test_scene_is_as_written(scene):
    assert maxsim(*scene, return_argmax=True)[1].tolist() == ARGMAX


class TestTokenGroups:
    def test_positions(self):
        assert token_groups(3, n_registers=2) == {"CLS": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, 6)}
        # empty groups are left out
        assert token_groups(4, n_cls=0) == {"patches": slice(0, 4)}

    def test_negative(self):
        with pytest.raises(ValueError, match="n_registers must be 0 or more, got -1"):
            token_groups(4, n_registers=-1)


class TestArgmaxShare:
    def test_hand_counted(self, scene):
        share = argmax_share(*scene, GROUPS)
        assert share.names == ("CLS", "registers", "patches")
        assert share.wins.tolist() == [3, 1, 4]
        assert share.share.tolist() == [0.375, 0.125, 0.5]
        assert torch.allclose(share.chance, torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64))
        assert share.total == 8

    def test_scores_of_the_groups_sum_to_the_scores(self, scene):
        share = argmax_share(*scene, GROUPS)
        # CLS: 3 for (0,0,0) and 0 for the two zero ties; register: 4; patches: 0.5 + 1 + 1 + 2.
        assert share.score.tolist() == [3.0, 4.0, 4.5]
        assert float(share.score.sum()) == float(maxsim(*scene).sum())

    def test_row_by_name(self, scene):
        row = argmax_share(*scene, GROUPS)["registers"]
        assert row == {"wins": 1, "share": 0.125, "chance": 0.2, "lift": 0.625, "score": 4.0}
        with pytest.raises(KeyError, match="no group 'cls', there are CLS, registers, patches"):
            argmax_share(*scene, GROUPS)["cls"]

    def test_pairs_split_the_count(self, scene):
        own = own_pairs(torch.tensor([0, 1]), 2)
        assert argmax_share(*scene, GROUPS, pairs=own).wins.tolist() == [1, 1, 2]
        assert argmax_share(*scene, GROUPS, pairs=~own).wins.tolist() == [2, 0, 2]

    def test_normalize_removes_the_norm(self, scene):
        q, d = scene
        # By cosine (0,0,0) ties between CLS and p0 and goes to CLS; (1,1,1) ties register and p2, to the register.
        assert argmax_share(q, d, GROUPS, normalize=True).wins.tolist() == [3, 1, 4]
        d = d.clone()
        d[0, 0] = torch.tensor([3.0, 3, 0, 0, 0, 0])
        own = own_pairs(torch.tensor([0, 0]), 2)
        assert argmax_share(q[:1], d[:1], GROUPS, pairs=own[:1, :1]).wins.tolist() == [2, 0, 0]
        assert argmax_share(q[:1], d[:1], GROUPS, pairs=own[:1, :1], normalize=True).wins.tolist() == [0, 0, 2]

    def test_masked_tokens_neither_win_nor_count(self, scene):
        q, d = scene
        d_mask = torch.ones(2, 5, dtype=torch.bool)
        d_mask[0, 0] = False
        q_mask = torch.tensor([[True, False], [True, True]])
        q, d = q.clone(), d.clone()
        q[0, 1], d[0, 0] = NAN, NAN
        share = argmax_share(q, d, GROUPS, q_mask=q_mask, d_mask=d_mask)
        # (0,0,0) now p0; (1,0,1) ties at 0 and goes to the register; (0,1,0) CLS; (1,0,0) p2; (1,1) p1 and register.
        assert share.wins.tolist() == [1, 2, 3]
        # Three counted tokens see 4 valid tokens of document 0 without CLS, three see 5 of document 1.
        assert torch.allclose(share.chance, torch.tensor([0.1, 0.225, 0.675], dtype=torch.float64))
        assert not share.score.isnan().any()

    def test_document_without_valid_token_counts_nothing(self, scene):
        q, d = scene
        d_mask = torch.tensor([[True] * 5, [False] * 5])
        share = argmax_share(q, d, GROUPS, d_mask=d_mask)
        assert share.total == 4
        assert share.wins.tolist() == [2, 0, 2]
        assert float(share.chance.sum()) == pytest.approx(1)

    def test_nothing_counted_is_nan(self, scene):
        share = argmax_share(*scene, GROUPS, pairs=torch.zeros(2, 2))
        assert share.total == 0
        assert share.share.isnan().all()

    @pytest.mark.parametrize("where", [[1, 2], torch.tensor([1, 2]), torch.tensor([0, 1, 1, 0, 0], dtype=torch.bool)])
    def test_groups_by_positions_or_mask(self, scene, where):
        share = argmax_share(*scene, {"mine": where, "rest": [0, 3, 4]})
        assert share.wins.tolist() == [2, 6]

    def test_one_query_one_document(self, scene):
        q, d = scene
        assert argmax_share(q[0], d[0], GROUPS).wins.tolist() == [1, 0, 1]

    @pytest.mark.parametrize(
        ("groups", "text"),
        [
            ({"a": slice(0, 4)}, "exactly once, position 4 is in 0 groups"),
            ({"a": slice(0, 5), "b": [2]}, "exactly once, position 2 is in 2 groups"),
            ({"a": [0, 9]}, r"groups\['a'\] must hold positions within 0\.\.4"),
            ({"a": torch.ones(3, dtype=torch.bool)}, r"groups\['a'\] as a mask must have shape \[5\], got \[3\]"),
            ({}, "groups must name at least one group"),
        ],
        ids=["gap", "overlap", "outside", "mask-length", "empty"],
    )
    def test_bad_groups(self, scene, groups, text):
        with pytest.raises(ValueError, match=text):
            argmax_share(*scene, groups)

    def test_bad_shapes(self, scene):
        q, d = scene
        with pytest.raises(ValueError, match=r"pairs must have shape \[n_q, n_d\] = \[2, 2\], got \[2\]"):
            argmax_share(q, d, GROUPS, pairs=torch.ones(2))
        with pytest.raises(ValueError, match="q and tokens must share dim, got 5 and 6"):
            argmax_share(q[..., :5], d, GROUPS)
        with pytest.raises(ValueError, match=r"d_mask must have shape \[2, 5\], got \[5\]"):
            argmax_share(q, d, GROUPS, d_mask=torch.ones(5))
        with pytest.raises(ValueError, match=r"owner must hold document numbers within 0\.\.1, got \[0, 2\]"):
            own_pairs(torch.tensor([0, 2]), 2)


class TestSimilarityDistribution:
    def test_exact_values(self, scene):
        q, d = scene
        result = similarity_distribution(q[0], d[0], GROUPS)
        assert sorted(result.raw["CLS"].tolist()) == [0, 3]
        assert sorted(result.cosine["CLS"].tolist()) == [0, 1]
        assert sorted(result.raw["patches"].tolist()) == [0, 0, 0, 0, 0.5, 2]
        assert sorted(result.raw["maximum"].tolist()) == [0.5, 3]
        assert sorted(result.cosine["maximum"].tolist()) == [1, 1]
        assert result.raw_mean["maximum"] == 1.75
        assert result.cosine_mean["patches"] == pytest.approx(2 / 6)
        assert result.count == {"CLS": 2, "registers": 2, "patches": 6, "maximum": 2}

    def test_maxima_sum_to_the_scores(self, scene):
        own = own_pairs(torch.tensor([1, 0]), 2)
        result = similarity_distribution(*scene, GROUPS, pairs=own)
        assert float(result.raw["maximum"].sum()) == pytest.approx(float(maxsim(*scene)[own].sum()))
        expected = float(maxsim(*scene, normalize=True)[own].sum())
        assert float(result.cosine["maximum"].sum()) == pytest.approx(expected)

    def test_masked_tokens_are_left_out(self, scene):
        q, d = scene
        q, d = q.clone(), d.clone()
        q[0, 0], d[0, 2] = NAN, INF
        d_mask = torch.ones(2, 5, dtype=torch.bool)
        d_mask[0, 2] = False
        d_mask[1] = False
        q_mask = torch.tensor([[0, 1], [1, 1]])
        result = similarity_distribution(q, d, GROUPS, q_mask=q_mask, d_mask=d_mask)
        assert result.count == {"CLS": 3, "registers": 3, "patches": 6, "maximum": 3}
        for space in (result.raw, result.cosine):
            assert {name: len(values) for name, values in space.items()} == result.count
            assert all(values.isfinite().all() for values in space.values())
        assert sorted(result.raw["maximum"].tolist()) == [0, 0.5, 1]

    def test_sample_is_bounded_and_repeatable_with_exact_means(self):
        generator = torch.Generator().manual_seed(3)
        q, d = torch.randn(3, 17, 8, generator=generator), torch.randn(2, 33, 8, generator=generator)
        groups = token_groups(32)
        full = similarity_distribution(q, d, groups)
        part = similarity_distribution(q, d, groups, max_values=500, seed=7)
        assert len(full.raw["patches"]) == full.count["patches"] == 3 * 2 * 17 * 32
        assert 400 < len(part.raw["patches"]) < 600
        assert len(part.raw["maximum"]) == 3 * 2 * 17
        assert part.raw_mean == full.raw_mean
        assert full.raw_mean["patches"] == pytest.approx(float(full.raw["patches"].mean()), abs=1e-5)
        again = similarity_distribution(q, d, groups, max_values=500, seed=7)
        assert torch.equal(part.raw["patches"], again.raw["patches"])
        other = similarity_distribution(q, d, groups, max_values=500, seed=8)
        assert not torch.equal(part.raw["patches"][:100], other.raw["patches"][:100])

    def test_errors(self, scene):
        with pytest.raises(ValueError, match="max_values must be 1 or more, got 0"):
            similarity_distribution(*scene, GROUPS, max_values=0)
        with pytest.raises(ValueError, match='groups must not use the name "maximum"'):
            similarity_distribution(*scene, {"maximum": slice(0, 5)})


class TestGroundingMap:
    """A 2 x 3 grid, rows by columns, so that a swapped axis shows."""

    D = axis(0, 1, 2, 3, 4, 5) * torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None]
    Q = axis(5, 1) * torch.tensor([1.0, 0.5])[:, None]

    def test_hand_written(self):
        result = grounding_map(self.Q, self.D, (2, 3))
        assert result.map.tolist() == [[[0, 0, 0], [0, 0, 6]], [[0, 1, 0], [0, 0, 0]]]
        assert result.argmax.tolist() == [5, 1]
        assert result.contribution.tolist() == [6, 1]
        assert float(result.score) == 7 == float(maxsim(self.Q, self.D))
        assert result.total().tolist() == [[0, 1, 0], [0, 0, 6]]
        assert result.wins().tolist() == [[0, 1, 0], [0, 0, 1]]

    def test_colpali_orientation(self):
        result = grounding_map(self.Q, self.D, (2, 3), axes="xy")
        assert result.map.tolist() == [[[0, 0], [0, 0], [0, 6]], [[0, 0], [1, 0], [0, 0]]]
        assert result.total().shape == (3, 2)
        assert result.wins().shape == (2, 3)
        assert torch.equal(from_colpali(result.map), grounding_map(self.Q, self.D, (2, 3)).map)

    def test_conversions(self):
        maps = torch.arange(6).view(1, 2, 3)
        assert to_colpali(maps).tolist() == [[[0, 3], [1, 4], [2, 5]]]
        assert torch.equal(from_colpali(to_colpali(maps)), maps)
        assert convert_axes(maps, source="xy", target="xy") is maps
        with pytest.raises(ValueError, match='target must be "yx" or "xy", got \'rc\''):
            convert_axes(maps, source="yx", target="rc")
        with pytest.raises(ValueError, match=r"at least the two grid axes, got shape \[3\]"):
            to_colpali(torch.ones(3))

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_sums_to_the_score(self, normalize, dtype):
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(17, 33, generator=generator).to(dtype)
        d = torch.randn(4, 15, 33, generator=generator).to(dtype)
        d_mask = torch.rand(4, 15, generator=generator) < 0.6
        q_mask = torch.rand(17, generator=generator) < 0.6
        result = grounding_map(q, d, (3, 5), q_mask=q_mask, d_mask=d_mask, normalize=normalize)
        assert result.map.shape == (4, 17, 3, 5)
        torch.testing.assert_close(result.map.sum((-1, -2, -3)), result.score, rtol=1e-5, atol=1e-5)
        assert ((result.map != 0).sum((-1, -2)) == q_mask).all()
        assert not result.map[0].flatten(-2)[:, ~d_mask[0]].any()

    def test_negative_contributions_stay(self):
        result = grounding_map(torch.tensor([[1.0]]), torch.tensor([[-3.0], [-2.0]]), (1, 2))
        assert result.map.tolist() == [[[0, -2]]]
        assert float(result.score) == -2

    def test_several_tokens_on_one_patch(self):
        result = grounding_map(self.Q[[0, 0, 1]], self.D, (2, 3))
        assert result.wins().tolist() == [[0, 1, 0], [0, 0, 2]]
        assert result.total().tolist() == [[0, 1, 0], [0, 0, 12]]

    def test_image_without_a_valid_patch(self):
        result = grounding_map(self.Q, self.D, (2, 3), d_mask=torch.zeros(6))
        assert float(result.score) == -INF
        assert result.argmax.tolist() == [-1, -1]
        assert not result.map.any()
        assert not result.wins().any()

    @pytest.mark.parametrize(
        ("grid", "options", "text"),
        [
            ((2, 2), {}, "grid must multiply to the number of patch tokens, got 2 x 2 = 4 for 6 tokens"),
            ((-2, -3), {}, "grid must multiply"),
            ((2, 3), {"axes": "rc"}, 'axes must be "yx" or "xy", got \'rc\''),
        ],
    )
    def test_errors(self, grid, options, text):
        with pytest.raises(ValueError, match=text):
            grounding_map(self.Q, self.D, grid, **options)

    def test_batched_query(self):
        with pytest.raises(ValueError, match=r"q must be one query \[l_q, dim\], got shape \[1, 2, 6\]"):
            grounding_map(self.Q[None], self.D, (2, 3))


class TestTokenNorms:
    def tokens(self):
        """Two images of CLS and 7 patches; norms 7 | 1 2 3 4 5 6 40 and 2 | 3 3 3 3 3 3 3."""
        norms = torch.tensor([[7.0, 1, 2, 3, 4, 5, 6, 40], [2.0, 3, 3, 3, 3, 3, 3, 3]])
        return norms[..., None] * torch.tensor([0.6, 0.0, -0.8])

    def test_flags_by_hand(self):
        result = token_norms(self.tokens(), groups=token_groups(7), k=10)
        torch.testing.assert_close(result.before["CLS"], torch.tensor([[7.0], [2.0]]))
        # Image 0: median 4, deviations 3 2 1 0 1 2 36 with median 2, threshold 24. Image 1: no spread, threshold 3.
        torch.testing.assert_close(result.threshold, torch.tensor([24.0, 3.0]))
        assert result.outlier.nonzero().tolist() == [[0, 6]]
        assert result.outlier_share == pytest.approx(1 / 14)
        assert result.largest_ratio == pytest.approx(10)
        assert result.after is None

    def test_k(self):
        assert token_norms(self.tokens(), groups=token_groups(7), k=0.5).outlier.sum(1).tolist() == [2, 0]
        assert not token_norms(self.tokens(), groups=token_groups(7), k=20).outlier.any()

    def test_after_the_norm(self):
        before = self.tokens()
        after = torch.nn.functional.normalize(before, dim=-1)
        result = token_norms(before, after, groups=token_groups(7))
        torch.testing.assert_close(result.after["patches"], torch.ones(2, 7))
        assert result.outlier.sum() == 1

    def test_errors(self):
        before = self.tokens()
        with pytest.raises(ValueError, match=r"after must have the shape of before, \[2, 8, 3\], got \[2, 7, 3\]"):
            token_norms(before, before[:, 1:], groups=token_groups(7))
        with pytest.raises(ValueError, match="patches must name one of the groups CLS, patches, got 'patch'"):
            token_norms(before, groups=token_groups(7), patches="patch")
        with pytest.raises(ValueError, match="k must be 0 or more, got -1"):
            token_norms(before, groups=token_groups(7), k=-1)
        with pytest.raises(ValueError, match=r"before must be \[b, n, dim\], got shape \[8, 3\]"):
            token_norms(before[0], groups=token_groups(7))


SMALL = {"n_images": 8, "n_patches": 32, "trials": 2, "dim": 32}


class TestSimulation:
    def test_clean_extremes(self):
        """Without noise and shared part the outcome is exact."""
        clean = {**SMALL, "noise": 0.0, "shared": 0.0}
        result = simulate_cls_dominance("alignment", [0.0, 1.0], absorbed=1.0, **clean)
        # A query token that is its object's very direction has cosine 1 with that object's patches; a query token that
        # is the gist has cosine 1 with a CLS that is the gist.
        assert result.win_rate.tolist() == [[0, 1]] * 2
        assert result.pointing_kept.tolist() == [[1, 0]] * 2
        assert result.pointing_dropped[:, 0].tolist() == [1, 1]
        assert result.retrieval_kept[:, 1].tolist() == [1, 1]

    def test_cls_that_absorbed_nothing_never_wins_by_cosine(self):
        result = simulate_cls_dominance("alignment", [0.0, 0.5, 1.0], absorbed=0.0, **{**SMALL, "noise": 0.0})
        assert result.win_rate.max() == 0
        assert torch.equal(result.pointing_kept, result.pointing_dropped)

    def test_norm_ratio_counts_raw_and_not_by_cosine(self):
        raw = simulate_cls_dominance("norm_ratio", [0.0, 100.0], alignment=0.8, normalize=False, **SMALL)
        assert raw.win_rate[:, 0].max() == 0
        assert raw.win_rate[:, 1].min() == 1
        cosine = simulate_cls_dominance("norm_ratio", [0.5, 100.0], alignment=0.8, **SMALL)
        assert torch.equal(cosine.win_rate[:, 0], cosine.win_rate[:, 1])

    def test_dropping_is_blind_to_cls(self):
        result = simulate_cls_dominance("absorbed", [0.0, 1.0], alignment=0.9, **SMALL)
        assert torch.equal(result.pointing_dropped[:, 0], result.pointing_dropped[:, 1])
        assert torch.equal(result.retrieval_dropped[:, 0], result.retrieval_dropped[:, 1])
        assert (result.pointing_dropped > result.pointing_kept)[:, 1].all()

    def test_chances(self):
        result = simulate_cls_dominance("n_patches", [8, 99], **{**SMALL, "n_patches": 32})
        torch.testing.assert_close(result.chance, torch.tensor([1 / 9, 1 / 100], dtype=torch.float64))
        assert result.retrieval_chance == 1 / 8
        assert result.pointing_chance.tolist() == [1 / 8, 1 / 8]
        assert result.values.tolist() == [8, 99]

    def test_shapes_settings_and_seed(self):
        result = simulate_cls_dominance("noise", [0.5, 1, 2], **SMALL, seed=4)
        for name in ("win_rate", "retrieval_kept", "retrieval_dropped", "pointing_kept", "pointing_dropped"):
            values = getattr(result, name)
            assert values.shape == (2, 3)
            assert ((values >= 0) & (values <= 1)).all()
        assert result.settings["seed"] == 4
        again = simulate_cls_dominance("noise", [0.5, 1, 2], **SMALL, seed=4)
        assert torch.equal(result.pointing_kept, again.pointing_kept)
        # Trial t uses seed + t.
        shifted = simulate_cls_dominance("noise", [0.5, 1, 2], **SMALL, seed=5)
        assert torch.equal(result.pointing_dropped[1], shifted.pointing_dropped[0])

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"knob": "colour"}, "knob must be one of absorbed, alignment, shared, norm_ratio, noise, n_patches"),
            ({"values": []}, "values and trials must not be empty, got 0 values"),
            ({"values": [0.5, 1.5]}, r"alignment must be in 0\.\.1, got 1\.5"),
            ({"noise": -1}, "noise must be 0 or more, got -1"),
            ({"n_patches": 4}, "n_patches must be at least n_objects=8, got 4"),
            ({"l_q": 9}, "the scene needs 1 <= l_q <= n_objects <= n_concepts, got l_q=9"),
        ],
        ids=["knob", "no-values", "range", "noise", "patches", "query"],
    )
    def test_errors(self, options, text):
        with pytest.raises(ValueError, match=text):
            simulate_cls_dominance(**options)
