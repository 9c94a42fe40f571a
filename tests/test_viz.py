"""``latemax.viz``: what the figures show, that they can be saved, and that the user's settings are restored."""

import os
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import pytest
import torch

from latemax.analysis import (
    argmax_share,
    grounding_map,
    similarity_distribution,
    simulate_cls_dominance,
    token_groups,
    token_norms,
)

matplotlib = pytest.importorskip("matplotlib", reason="latemax.viz draws with matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from latemax import viz  # noqa: E402
from latemax.viz import _style  # noqa: E402

ROOT = Path(__file__).parents[1]
GROUPS = token_groups(6, n_registers=1)
GRID = (2, 3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 16, generator=generator), torch.randn(3, 8, 16, generator=generator)


@pytest.fixture(scope="module")
def simulation():
    return simulate_cls_dominance("alignment", [0.0, 0.5, 1.0], n_images=4, n_patches=16, trials=2, dim=16)


def image(height=28, width=42):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], -1).astype(np.uint8)


def png(fig):
    """PNG bytes of the figure. A missing glyph or a layout that does not fit fails the test."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig.savefig(buffer, format="png")
    data = buffer.getvalue()
    assert data.startswith(b"\x89PNG")
    pixels = plt.imread(BytesIO(data))[..., :3]
    assert 0.01 < (pixels < 0.98).any(-1).mean() < 0.99
    return data


def texts(fig):
    found = [t.get_text() for t in fig.findobj(matplotlib.text.Text)]
    return "\n".join(t for t in found if t)


def test_argmax_share_shows_the_numbers(tokens):
    share = argmax_share(*tokens, GROUPS)
    fig, ax = viz.plot_argmax_share({"raw": share, "cosine": argmax_share(*tokens, GROUPS, normalize=True)})
    png(fig)
    row = share["CLS"]
    assert f"({row['wins']} of 30; {row['lift']:.1f}x chance)" in texts(fig)
    assert "chance 12 %" in texts(fig)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["raw", "cosine"]


def test_argmax_share_of_zero(tokens):
    q, d = tokens
    d = d.clone()
    d[:, 0] = 0
    share = argmax_share(q, d, GROUPS)
    assert share["CLS"]["wins"] == 0
    fig, _ = viz.plot_argmax_share({"raw": share})
    png(fig)
    assert "0 %  (0 of 30; 0.0x chance)" in texts(fig)


def test_argmax_share_needs_a_condition():
    with pytest.raises(ValueError, match="shares must hold at least one condition"):
        viz.plot_argmax_share({})


def test_similarity_distribution(tokens):
    result = similarity_distribution(*tokens, GROUPS)
    fig, axes = viz.plot_similarity_distribution(result)
    png(fig)
    assert len(axes) == 2
    assert f"mean {result.cosine_mean['registers']:.3g}" in texts(fig)
    assert [t.get_text() for t in axes[0].get_yticklabels()][:3] == ["CLS", "registers", "patches"]


def test_simulation_draws_every_curve_and_chance(simulation):
    fig, ax = viz.plot_simulation({"one": simulation, "two": simulation})
    png(fig)
    curves = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert len(curves) == 3
    np.testing.assert_allclose(curves[0].get_ydata(), simulation.win_rate.mean(0))
    np.testing.assert_allclose(curves[2].get_ydata(), simulation.chance)
    for label in ("one", "two", "chance 5.9 %"):
        assert label in texts(fig)


def test_simulation_of_two_knobs_is_refused(simulation):
    other = simulate_cls_dominance("noise", [0.0], n_images=2, n_patches=8, trials=1, dim=8)
    with pytest.raises(ValueError, match=r"simulations must sweep one knob, got \['alignment', 'noise'\]"):
        viz.plot_simulation({"a": simulation, "b": other})


@pytest.mark.parametrize("measure", ["pointing", "retrieval"])
def test_dropping(simulation, measure):
    fig, ax = viz.plot_dropping(simulation, measure=measure)
    png(fig)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), getattr(simulation, f"{measure}_dropped").mean(0))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), getattr(simulation, f"{measure}_kept").mean(0))
    assert "CLS kept" in texts(fig)


def test_dropping_measure(simulation):
    with pytest.raises(ValueError, match='measure must be "pointing" or "retrieval", got \'rank\''):
        viz.plot_dropping(simulation, measure="rank")


def test_panels(simulation):
    fig, axes = viz.plot_simulation_panels(
        {"alignment": {"a": simulation}, "pointing": simulation, "retrieval": simulation}, titles={"alignment": "Up"}
    )
    png(fig)
    assert axes.shape == (2, 2)
    assert len(fig.axes) == 3
    assert fig.axes[0].get_title("left") == "Up"


def norms_of(scale):
    before = torch.ones(2, 8, 4) * torch.tensor([1.0, 1, 1, 1.2, 0.8, 1, 1.1, scale])[:, None]
    return token_norms(before, before / 2, groups=GROUPS)


def test_token_norms_with_and_without_outliers():
    fig, axes = viz.plot_token_norms(norms_of(30.0))
    png(fig)
    assert len(axes) == 2
    assert "2 of 12 patches exceed median + 10 MAD" in texts(fig)
    assert "flagged: median 60" in texts(fig)
    fig, _ = viz.plot_token_norms(norms_of(1.2))
    assert "0 of 12 patches exceed" in texts(fig)
    assert "flagged" not in texts(fig)


def test_norm_maps_outline_the_outliers():
    fig, axes = viz.plot_norm_maps([image(), image()], norms_of(30.0), GRID)
    png(fig)
    assert axes.shape == (2, 2)
    (outline,) = axes[1, 0].patches
    # The last of six patches: row 1, column 2.
    assert outline.get_xy() == (1.5, 0.5)
    assert axes[1, 0].get_xlabel() == "1 flagged"
    with pytest.raises(ValueError, match="images must be as many as norms has, 2, got 1"):
        viz.plot_norm_maps([image()], norms_of(1.2), GRID)
    with pytest.raises(ValueError, match="grid must multiply to 6 patches, got 2 x 2"):
        viz.plot_norm_maps([image(), image()], norms_of(1.2), (2, 2))


def overlay(ax):
    """The block overlay: the last image of the axes, with its alpha."""
    return ax.images[-1]


@pytest.mark.parametrize("axes", ["yx", "xy"])
def test_grounding_blocks_are_true_patches(axes):
    q, d = torch.eye(6)[[5, 5, 1]], torch.eye(6)
    fig, ax = viz.plot_grounding(image(), grounding_map(q, d, GRID, axes=axes), box=(0, 14, 28, 28))
    png(fig)
    shown = overlay(ax)
    alpha = shown.get_array()[..., 3]
    assert alpha.shape == GRID
    assert (alpha > 0).tolist() == [[False, True, False], [False, False, True]]
    assert alpha[1, 2] > alpha[0, 1]
    # One block per patch over the whole image, without smoothing between them.
    assert shown.get_extent() == [-0.5, 41.5, 27.5, -0.5]
    assert shown.get_interpolation() == "nearest"
    assert ax.patches[0].get_width() == 28
    assert "The score 3.0 comes from 2 of 6 patches" in texts(fig)


def test_grounding_is_drawn_where_the_crop_was():
    """The encoder saw the centre 400 x 400 pixels of a 600 x 400 photo."""
    grounding = grounding_map(torch.eye(4)[[3]], torch.eye(4), (2, 2))
    crop = torch.tensor([100 / 600, 0.0, 500 / 600, 1.0])
    fig, ax = viz.plot_grounding(image(400, 600), grounding, crop=crop)
    png(fig)
    assert overlay(ax).get_extent() == pytest.approx([99.5, 499.5, 399.5, -0.5], abs=1e-3)
    assert ax.get_xlim() == (-0.5, 599.5) and ax.get_ylim() == (399.5, -0.5)
    argmax = torch.tensor([0, 1, 2, 3])
    _, ax = viz.plot_correspondence(image(400, 600), argmax, (2, 2), (2, 2), crop=(0, 0, 0.5, 1))
    assert overlay(ax).get_extent() == [-0.5, 299.5, 399.5, -0.5]
    _, axes = viz.plot_ranking(
        image(28, 28), (2, 2), [image(400, 600)], ["a"], [1.0], argmax[None], (2, 2), crops=[(0.5, 0, 1, 1)]
    )
    assert overlay(axes[1, 1]).get_extent() == [299.5, 599.5, 399.5, -0.5]


@pytest.mark.parametrize("size", [(400, 600), (600, 400), (300, 400)])
def test_an_image_of_another_aspect_than_the_grid_is_refused(size):
    grounding = grounding_map(torch.eye(16)[:2], torch.eye(16), (4, 4))
    height, width = size
    with pytest.raises(ValueError, match=f"got {width} x {height} for a grid of 4 x 4 patches; pass crop="):
        viz.plot_grounding(image(*size), grounding)
    with pytest.raises(ValueError, match=f"got {width} x {height} for a grid of 4 x 4 patches"):
        viz.plot_correspondence(image(*size), torch.tensor([1]), (4, 4), (1, 1))
    # the whole image squashed to a square: said by the crop
    _, ax = viz.plot_grounding(image(*size), grounding, crop=(0, 0, 1, 1))
    assert overlay(ax).get_extent() == [-0.5, width - 0.5, height - 0.5, -0.5]


@pytest.mark.parametrize("crop", [(0, 0, 0, 1), (-0.1, 0, 1, 1), (0, 0, 224, 224), (0.5, 0, float("nan"), 1)])
def test_a_crop_that_is_no_part_of_the_image_is_refused(crop):
    with pytest.raises(ValueError, match="crop must be"):
        viz.plot_grounding(image(), grounding_map(torch.eye(6)[:2], torch.eye(6), GRID), crop=crop)


def test_a_photo_is_drawn_upright():
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    photo, buffer = pillow.fromarray(image(28, 42)), BytesIO()
    exif = pillow.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(buffer, "png", exif=exif)
    with pillow.open(buffer) as turned:
        assert np.array_equal(_style.as_uint8(turned), np.rot90(image(28, 42), -1))


def test_grounding_of_a_batch_is_refused():
    result = grounding_map(torch.eye(6)[:2], torch.eye(6)[None].repeat(2, 1, 1), GRID)
    with pytest.raises(ValueError, match=r"grounding must be of one image, got a batch of shape \[2\]"):
        viz.plot_grounding(image(), result)


def test_grounding_of_an_empty_query_draws_the_photo():
    result = grounding_map(torch.eye(6)[:2], torch.eye(6), GRID, q_mask=torch.zeros(2))
    fig, ax = viz.plot_grounding(image(), result)
    png(fig)
    assert not overlay(ax).get_array()[..., 3].any()


def test_correspondence_colours_the_argmax_by_the_query_patch():
    colors = viz.position_colors(1, 3)
    fig, ax = viz.plot_correspondence(image(), torch.tensor([4, 0, 0]), GRID, (1, 3))
    png(fig)
    shown = np.asarray(overlay(ax).get_array())
    np.testing.assert_allclose(shown[1, 1, :3], colors[0])
    np.testing.assert_allclose(shown[0, 0, :3], (colors[1] + colors[2]) / 2)
    assert shown[..., 3].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_correspondence_leaves_masked_query_tokens_out():
    _, ax = viz.plot_correspondence(image(), torch.tensor([-1, 2]), GRID, (1, 2))
    assert np.asarray(overlay(ax).get_array())[..., 3].tolist() == [[0, 0, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"argmax must be \[4\] for query_grid \(2, 2\), got \[2\]"):
        viz.plot_correspondence(image(), torch.tensor([0, 1]), GRID, (2, 2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (8, 8)])
def test_position_colours_differ(shape):
    colors = viz.position_colors(*shape)
    assert colors.shape == (shape[0] * shape[1], 3)
    assert colors.min() >= 0 and colors.max() <= 1
    assert len({tuple(c) for c in colors.round(3).tolist()}) == len(colors)
    lightness = colors.reshape(*shape, 3).sum(-1)
    assert (np.diff(lightness, axis=0) < 0).all()


def test_ranking_names_ranks_and_scores():
    argmax = torch.tensor([[0, 1], [2, 2], [5, 0]])
    fig, axes = viz.plot_ranking(
        image(14, 28), (1, 2), [image()] * 3, ["a", "b", "c"], [3.0, 2.5, 1.25], argmax, GRID,
        ranks=[1, 2, 9], own=2, box=(0, 0, 14, 14), title="Third",
    )  # fmt: skip
    png(fig)
    assert axes.shape == (2, 4)
    assert [ax.get_title("left") for ax in axes[0]] == ["query crop", "1. a", "2. b", "9. c"]
    assert [ax.get_xlabel() for ax in axes[0, 1:]] == ["score 3.00", "score 2.50", "score 1.25"]
    assert [len(ax.patches) for ax in axes.flat] == [0, 0, 0, 2, 0, 0, 0, 2]
    with pytest.raises(ValueError, match="must have one length, got 3, 2, 3 and 3"):
        viz.plot_ranking(image(), (1, 2), [image()] * 3, ["a", "b"], [3.0, 2, 1], argmax, GRID)


@pytest.mark.parametrize(
    "picture",
    [image(), image()[..., 0], image() / 255.0, np.dstack([image(), image()[..., :1]]), torch.from_numpy(image())],
    ids=["uint8", "grey", "float", "alpha", "tensor"],
)
def test_image_forms(picture):
    result = _style.as_uint8(picture)
    assert result.shape == (28, 42, 3) and result.dtype == np.uint8
    assert (result[..., 0] == image()[..., 0]).all()


def test_image_form_refused():
    text = r"image must be \[H, W\], \[H, W, 3\] or \[H, W, 4\], got shape \[3, 28, 42\]"
    with pytest.raises(ValueError, match=text):
        _style.as_uint8(np.zeros((3, 28, 42)))


def test_users_axes_and_settings_are_kept(simulation):
    before = dict(matplotlib.rcParams)
    own, ax = plt.subplots()
    fig, same = viz.plot_simulation({"a": simulation}, ax=ax)
    assert fig is own and same is ax
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 %"), (0.0001, "< 0.1 %"), (0.0039, "0.4 %"), (0.125, "12 %"), (0.998, "99.8 %"), (1, "100 %")],
)
def test_percent(value, text):
    assert _style.percent(value) == text


def test_labels_keep_their_distance_and_order():
    heights = _style.spread_labels([0.5, 0.99, 0.5, 1.0], 0.1, 0.0, 1.0)
    assert heights == pytest.approx([0.5, 0.9, 0.6, 1.0])
    assert _style.spread_labels([], 0.1, 0, 1) == []


def test_importing_viz_does_not_import_matplotlib():
    program = ROOT / "tests" / "programs" / "import_viz.py"
    subprocess.run([sys.executable, program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_without_matplotlib_the_extra_is_named(simulation, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delattr(matplotlib, "pyplot")
    with pytest.raises(ImportError, match=r'latemax\.viz needs matplotlib: pip install "latemax\[viz\]"'):
        viz.plot_simulation({"a": simulation})
