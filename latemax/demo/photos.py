"""Real photos that scikit-image, scikit-learn and matplotlib install as sample data; nothing is downloaded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# (name, package, file inside the package). Opened directly, since the packages' own loaders may use the network.
_FILES = (
    ("astronaut", "skimage", "data/astronaut.png"),
    ("cat", "skimage", "data/chelsea.png"),
    ("coffee", "skimage", "data/coffee.png"),
    ("rocket", "skimage", "data/rocket.jpg"),
    ("galaxies", "skimage", "data/hubble_deep_field.jpg"),
    ("retina", "skimage", "data/retina.jpg"),
    ("tissue", "skimage", "data/ihc.png"),
    ("cameraman", "skimage", "data/camera.png"),
    ("coins", "skimage", "data/coins.png"),
    ("moon", "skimage", "data/moon.png"),
    ("page", "skimage", "data/page.png"),
    ("handwriting", "skimage", "data/text.png"),
    ("clock", "skimage", "data/clock_motion.png"),
    ("cell", "skimage", "data/cell.png"),
    ("brick", "skimage", "data/brick.png"),
    ("grass", "skimage", "data/grass.png"),
    ("gravel", "skimage", "data/gravel.png"),
    ("motorcycle", "skimage", "data/motorcycle_left.png"),
    ("temple", "sklearn", "datasets/images/china.jpg"),
    ("flower", "sklearn", "datasets/images/flower.jpg"),
    ("portrait", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
_PIP_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow"}


@dataclass(frozen=True)
class Photo:
    """An RGB photo, cropped to its centre square."""

    name: str
    image: Image


@dataclass(frozen=True)
class Crop:
    """A square crop of photo ``owner``; ``box`` is (left, top, right, bottom) in fractions of the photo's side."""

    owner: int
    box: tuple[float, float, float, float]
    image: Image

    def pixels(self, side: int) -> tuple[float, float, float, float]:
        """Returns ``box`` in the pixels of a photo of that side."""
        left, top, right, bottom = self.box
        return left * side, top * side, right * side, bottom * side


def require(*packages: str) -> None:
    """Checks that packages are installed.

    Raises:
        ImportError: names the first missing package and the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(
                f"the demo needs {_PIP_NAMES.get(package, package)}, which is not installed: "
                'pip install "latemax[demo]"'
            )


def load_photos() -> list[Photo]:
    """Loads the 21 photos, each cropped to its centre square.

    Photos that an installed version no longer ships are left out.

    Raises:
        ImportError: one of the packages is missing.
        RuntimeError: fewer than two photos are left.
    """
    require("PIL", "skimage", "sklearn", "matplotlib")
    from PIL import Image

    photos = []
    for name, package, file in _FILES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).parent / file
        if not path.is_file():
            continue
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        photos.append(Photo(name, image.crop((left, top, left + side, top + side))))
    if len(photos) < 2:
        raise RuntimeError(f"the demo found {len(photos)} of its {len(_FILES)} photos in the installed packages")
    return photos


def random_crops(photos: list[Photo], per_photo: int = 3, *, side: float = 0.5, seed: int = 0) -> list[Crop]:
    """Cuts square crops at random places.

    At half the side, encoded at half the size, a patch of the crop covers as much of the photo as a patch of the photo.

    Args:
        photos: square photos.
        per_photo: crops per photo.
        side: side of a crop as a fraction of the photo's side.
        seed: seed of the places.
    """
    rng = random.Random(seed)
    crops = []
    for owner, photo in enumerate(photos):
        full = photo.image.width
        size = round(full * side)
        for _ in range(per_photo):
            left, top = rng.randint(0, full - size), rng.randint(0, full - size)
            right, bottom = left + size, top + size
            box = (left / full, top / full, right / full, bottom / full)
            crops.append(Crop(owner, box, photo.image.crop((left, top, right, bottom))))
    return crops


def compose(photos: list[Photo], n: int, size: int, seed: int) -> tuple[list[Image], Tensor]:
    """Makes n canvases of size x size pixels from random crops of four different photos each.

    Returns:
        (canvases, photos int64 [n, 4]): which photo is in which quadrant, row-major.
    """
    import torch
    from PIL import Image

    rng, half = random.Random(seed), size // 2
    canvases, which = [], []
    for _ in range(n):
        canvas, four = Image.new("RGB", (size, size)), rng.sample(range(len(photos)), 4)
        for quadrant, at in enumerate(four):
            full = photos[at].image.width
            side = round(full * rng.uniform(0.6, 1.0))
            left, top = rng.randint(0, full - side), rng.randint(0, full - side)
            crop = photos[at].image.crop((left, top, left + side, top + side)).resize((half, half))
            canvas.paste(crop, (quadrant % 2 * half, quadrant // 2 * half))
        canvases.append(canvas)
        which.append(four)
    return canvases, torch.tensor(which)
