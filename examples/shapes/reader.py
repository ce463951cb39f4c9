"""The attribute reader: a small classifier that says what is in a picture, place by place.

For each of the five places it reads empty-or-shape, colour and size, and it reads the background.
It is trained on rendered scenes with noise and blur and on VAE reconstructions of them, never on
pictures of the diffusion model that it scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from shapes.scenes import (
    BACKGROUND_NAMES,
    CENTRES,
    COLOUR_NAMES,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    scene_targets,
)

READER_PATH = Path(__file__).parent / "reader.safetensors"
EMPTY = len(SHAPES)
_PER_PLACE = (len(SHAPES) + 1, len(COLOUR_NAMES), len(SIZES))
HEAD_SIZES = (*_PER_PLACE * len(PLACES), len(BACKGROUND_NAMES))
_CROP, _MARGIN = 16, 2
_CORNERS = [(round(CENTRES[p][0]) - 8 + _MARGIN, round(CENTRES[p][1]) - 8 + _MARGIN) for p in PLACES]
Images = np.ndarray | Tensor


class Reader(nn.Module):
    """One small network that looks at a 16 x 16 crop around each place in turn.

    The weights are shared by the places: what the reader knows of a shape and a colour at one place
    it knows at all, so triples that its training never showed are read as well as the others.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out, stride in ((3, 32, 1), (32, 64, 2), (64, 96, 2)):
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1),
                nn.GroupNorm(8, c_out),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 192), nn.SiLU())
        self.object_heads = nn.Linear(192, sum(_PER_PLACE))
        self.background_head = nn.Linear(192, len(BACKGROUND_NAMES))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """``pixels`` [n, 3, 32, 32] in -1..1 to 16 groups of logits, ordered as scene_targets."""
        padded = F.pad(pixels, (_MARGIN,) * 4, mode="replicate")
        crops = [padded[:, :, y : y + _CROP, x : x + _CROP] for x, y in _CORNERS]
        hidden = self.features(torch.cat(crops)).unflatten(0, (len(crops), -1))
        groups = [g for h in hidden for g in self.object_heads(h).split(_PER_PLACE, dim=1)]
        return [*groups, self.background_head(hidden.mean(0))]


@dataclass(frozen=True)
class Score:
    """How much of the captions is in the pictures.

    ``accuracy`` is the mean over all named attributes; ``by_kind`` splits it into place, shape,
    colour, size and background; ``per_image`` holds one fraction per picture. ``exact`` is the
    share of pictures with every attribute right and nothing at a place that the caption does not
    name, ``extra`` the share of pictures with something at such a place.
    """

    accuracy: float
    by_kind: dict[str, float]
    per_image: np.ndarray
    exact: float
    extra: float


def to_pixels(images: Images) -> Tensor:
    """uint8 or float (0..1) pictures [n, h, w, 3], numpy or torch, to [n, 3, 32, 32] in -1..1."""
    x = torch.as_tensor(np.asarray(images))
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return x.permute(0, 3, 1, 2) * 2 - 1


def load_reader(path: str | Path = READER_PATH) -> Reader:
    """The trained reader, in evaluation mode."""
    reader = Reader()
    reader.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    return reader.eval()


@torch.no_grad()
def read(images: Images, reader: Reader | None = None) -> np.ndarray:
    """Predicted class indices, int64 [n, 16], ordered as ``scene_targets`` (EMPTY for no shape)."""
    reader = reader or load_reader()
    chunks = to_pixels(images).split(256)
    found = [torch.stack([g.argmax(1) for g in reader(c)], dim=1) for c in chunks]
    return torch.cat(found).numpy()


def describe(images: Images, reader: Reader | None = None) -> list[Scene]:
    """The scenes that the reader sees (any number of objects)."""
    scenes = []
    for row in read(images, reader):
        places = row[:-1].reshape(len(PLACES), 3)
        objects = tuple(
            SceneObject(SHAPES[s], COLOUR_NAMES[c], SIZES[z], PLACES[p])
            for p, (s, c, z) in enumerate(places)
            if s != EMPTY
        )
        scenes.append(Scene(BACKGROUND_NAMES[row[-1]], objects))
    return scenes


def score(images: Images, scenes: Sequence[Scene], reader: Reader | None = None) -> Score:
    """Compare pictures with the scenes that their captions describe.

    A caption with k objects names 4k + 1 attributes. For each object, *place* is right when the
    reader sees any object at its place; *shape*, *colour* and *size* are right when the object seen
    there has that value (all wrong when the place is empty). The background is the last attribute.
    """
    found = read(images, reader)
    wanted = scene_targets(scenes)
    n = len(wanted)
    want = wanted[:, :-1].reshape(n, len(PLACES), 3)
    got = found[:, :-1].reshape(n, len(PLACES), 3)
    named = want[:, :, 0] != EMPTY
    present = named & (got[:, :, 0] != EMPTY)
    extra = ((got[:, :, 0] != EMPTY) & ~named).any(axis=1)
    right = present[:, :, None] & (got == want)
    background = found[:, -1] == wanted[:, -1]
    n_right = present.sum(1) + right.sum((1, 2)) + background
    n_named = 4 * named.sum(1) + 1
    by_kind = {"place": present[named].mean(), "background": background.mean()}
    by_kind |= {k: right[:, :, i][named].mean() for i, k in enumerate(("shape", "colour", "size"))}
    return Score(
        accuracy=float(n_right.sum() / n_named.sum()),
        by_kind={k: float(v) for k, v in by_kind.items()},
        per_image=n_right / n_named,
        exact=float(((n_right == n_named) & ~extra).mean()),
        extra=float(extra.mean()),
    )
