"""Scenes of coloured shapes: their attributes, pictures, captions and the train / held-out split.

A scene is one or two objects on a flat background. Every object has four independent attributes
(shape, colour, size, place); the background has a colour. The captions name all of them, so a
picture can be scored attribute by attribute (see :mod:`shapes.reader`).

The split is compositional: ``heldout_triples()`` lists (colour, shape, place) triples that no
training scene contains, and every object of a held-out scene is one of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 30),
    "green": (30, 160, 60),
    "cyan": (40, 210, 225),
    "blue": (35, 70, 215),
    "purple": (140, 45, 175),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "black": (15, 15, 18),
    "gray": (128, 128, 128),
    "brown": (95, 60, 35),
    "pink": (250, 175, 195),
    "white": (250, 250, 250),
    "green": (30, 160, 60),
    "blue": (35, 70, 215),
    "yellow": (250, 225, 30),
}
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
IMAGE_SIZE = 32
REHEARSALS = (3, 6)  # by how many colours each fold of the rehearsal is away from the held-out triples

# Words that mean the same attribute value; the first of each is the canonical one.
_SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
_PLACE_PHRASES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on the top", "on the top side"),
    "bottom": ("at the bottom", "on the bottom", "on the bottom side"),
    "centre": ("in the centre", "in the middle", "at the centre"),
}
_OBJECT_PHRASES = (
    "a {size} {colour} {shape} {place}",
    "one {size} {colour} {shape} {place}",
    "a {colour} {shape} that is {size} {place}",
    "{place} a {size} {colour} {shape}",
)
_SCENE_PHRASES = (
    "{objects} on a {background} background",
    "{objects}, {background} background",
    "a {background} background with {objects}",
    "a picture of {objects} on a {background} background",
    "on a {background} background, {objects}",
    "there is {objects} in front of a {background} background",
)
_JOINTS = (" and ", ", and ", " with ", ", ")


@dataclass(frozen=True)
class SceneObject:
    """One object; all four fields are canonical attribute words."""

    shape: str
    colour: str
    size: str
    place: str

    @property
    def triple(self) -> tuple[str, str, str]:
        """The part of the object that the train / held-out split looks at."""
        return (self.colour, self.shape, self.place)


@dataclass(frozen=True)
class Scene:
    """A background colour and one or two objects at different places."""

    background: str
    objects: tuple[SceneObject, ...]

    @property
    def n_attributes(self) -> int:
        """Attributes that the caption names: four for each object, and the background."""
        return 4 * len(self.objects) + 1


@dataclass(frozen=True)
class Example:
    """A scene and a caption of it."""

    caption: str
    scene: Scene


@lru_cache(maxsize=1)
def heldout_triples() -> frozenset[tuple[str, str, str]]:
    """The (colour, shape, place) triples kept out of training: one colour for each shape and place.

    That is 25 of 200 (12.5 %). Walking through the colours in turn keeps every single value and
    every pair of values well represented on the training side.
    """
    pairs = [(shape, place) for shape in SHAPES for place in PLACES]
    return frozenset((COLOUR_NAMES[i % len(COLOUR_NAMES)], s, p) for i, (s, p) in enumerate(pairs))


@lru_cache(maxsize=len(REHEARSALS))
def rehearsal_triples(fold: int = 0) -> frozenset[tuple[str, str, str]]:
    """25 training triples that are to the other training triples what the held-out ones are to all: one colour for each shape and place.

    What is fitted without them and tried on them tells, from public data, how the held-out ones will fare. Folds have no triple in
    common.
    """
    pairs = [(shape, place) for shape in SHAPES for place in PLACES]
    shift = REHEARSALS[fold]
    return frozenset((COLOUR_NAMES[(i + shift) % len(COLOUR_NAMES)], s, p) for i, (s, p) in enumerate(pairs))


@lru_cache(maxsize=16)
def _triples(heldout: bool, rehearsal: bool | None = None, fold: int = 0) -> tuple[tuple[str, str, str], ...]:
    """The split's triples; rehearsal: only those of that fold's rehearsal, only the others, or both."""
    every = [(c, s, p) for c in COLOUR_NAMES for s in SHAPES for p in PLACES]
    return tuple(
        t
        for t in every
        if (t in heldout_triples()) == heldout and rehearsal in (None, t in rehearsal_triples(fold))
    )


def _sample_scene(rng: np.random.Generator, triples: Sequence[tuple[str, str, str]]) -> Scene:
    background = BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))]
    wanted = int(rng.integers(1, 3))
    objects: list[SceneObject] = []
    while len(objects) < wanted:
        colour, shape, place = triples[rng.integers(len(triples))]
        if colour == background or any(o.place == place for o in objects):
            continue
        objects.append(SceneObject(shape, colour, SIZES[rng.integers(len(SIZES))], place))
    return Scene(background, tuple(objects))


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[rng.integers(len(options))]


def _object_phrases(scene: Scene, rng: np.random.Generator) -> list[str]:
    return [
        _choose(rng, _OBJECT_PHRASES).format(
            size=_choose(rng, _SIZE_WORDS[o.size]),
            colour=o.colour,
            shape=o.shape,
            place=_choose(rng, _PLACE_PHRASES[o.place]),
        )
        for o in scene.objects
    ]


def make_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of ``scene`` in one of many phrasings, all attributes named."""
    described = _object_phrases(scene, rng)
    objects = _choose(rng, _JOINTS).join(described)
    return _choose(rng, _SCENE_PHRASES).format(objects=objects, background=scene.background)


def canonical_caption(scene: Scene) -> str:
    """The plainest caption: "a large red circle on the left and ... on a green background"."""
    objects = " and ".join(
        f"a {o.size} {o.colour} {o.shape} {_PLACE_PHRASES[o.place][0]}" for o in scene.objects
    )
    return f"{objects} on a {scene.background} background"


def phrases(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One phrase per object and one for the background; joined by ", " they are a caption of the grammar."""
    return [*_object_phrases(scene, rng), f"{scene.background} background"]


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of this grammar describes.

    Every phrasing names the four attributes of an object next to each other, so the i-th word of
    each kind belongs to the i-th object; the background colour stands before "background".
    """
    size_of = {w: size for size, words in _SIZE_WORDS.items() for w in words}
    words = re.findall(r"[a-z]+", caption.lower().replace("middle", "centre"))
    background = [w for w, after in pairwise(words) if after == "background"]
    skipped = {i for i, after in enumerate(words[1:]) if after == "background"}
    rest = [w for i, w in enumerate(words) if i not in skipped]
    shapes = [w for w in rest if w in SHAPES]
    colours = [w for w in rest if w in COLOURS]
    sizes = [size_of[w] for w in rest if w in size_of]
    places = [w for w in rest if w in PLACES]
    counts = {len(shapes), len(colours), len(sizes), len(places)}
    if len(background) != 1 or background[0] not in BACKGROUNDS or len(counts) != 1 or not shapes:
        raise ValueError(f"not a caption of this grammar: {caption!r}")
    objects = tuple(SceneObject(*o) for o in zip(shapes, colours, sizes, places, strict=True))
    return Scene(background[0], objects)


def caption_words() -> list[str]:
    """Every word and punctuation mark that a caption can contain, sorted."""
    phrases = [*_OBJECT_PHRASES, *_SCENE_PHRASES, *_JOINTS, *SHAPES, *COLOURS, *BACKGROUNDS]
    phrases += [p for options in (*_PLACE_PHRASES.values(), *_SIZE_WORDS.values()) for p in options]
    text = re.sub(r"\{\w+\}", " ", " ".join(phrases))
    return sorted(set(re.findall(r"[a-z]+|[^\sa-z]", text)))


def _examples(
    n: int, seed: int, heldout: bool, rehearsal: bool | None = None, fold: int = 0
) -> list[Example]:
    rng = np.random.default_rng([seed, int(heldout)])
    scenes = [_sample_scene(rng, _triples(heldout, rehearsal, fold)) for _ in range(n)]
    return [Example(make_caption(s, rng), s) for s in scenes]


def train_examples(n: int, seed: int, *, rehearsal: bool | None = None, fold: int = 0) -> list[Example]:
    """``n`` captioned scenes without any held-out triple; of a fold's rehearsal's triples only (True), or of the others only (False)."""
    return _examples(n, seed, heldout=False, rehearsal=rehearsal, fold=fold)


def heldout_examples(n: int, seed: int) -> list[Example]:
    """``n`` captioned scenes whose every object is a triple never seen in training."""
    return _examples(n, seed, heldout=True)


def train_captions(n: int, seed: int) -> list[str]:
    """Captions of :func:`train_examples`: public data for calibration."""
    return [e.caption for e in train_examples(n, seed)]


def heldout_captions(n: int, seed: int) -> list[str]:
    """Captions of :func:`heldout_examples`: prompts that play the private part."""
    return [e.caption for e in heldout_examples(n, seed)]


# --- rendering -------------------------------------------------------------------------------

_WINDOW = 16  # side of the square patch that holds one object
_SUB = 4  # sub-pixel positions along each axis
_SCALES = (0.95, 1.0, 1.05)
_RADIUS = {"small": 3.6, "large": 5.6}
CENTRES = {  # (x, y) in pixels
    "left": (6.25, 16.0),
    "right": (25.75, 16.0),
    "top": (16.0, 6.25),
    "bottom": (16.0, 25.75),
    "centre": (16.0, 16.0),
}


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd test of the points (x, y) against a closed polygon."""
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points in units of the radius (y down) lie in the shape."""
    if shape == "circle":
        return x**2 + y**2 <= 1.0
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.92
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return (np.maximum(ax, ay) <= 1.05) & (np.minimum(ax, ay) <= 0.34)
    if shape == "triangle":
        return _polygon(np.array([(0.0, -1.05), (1.1, 0.9), (-1.1, 0.9)]), x, y)
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.18, 0.47)
    return _polygon(np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1), x, y)


@lru_cache(maxsize=1)
def _mask_bank() -> np.ndarray:
    """Antialiased masks, indexed [shape, size, scale, sub-pixel y, sub-pixel x, row, column].

    Drawing every object from this bank makes rendering a gather and a blend. Each mask is the mean
    of an 8 x 8 supersampled inside test.
    """
    fine = (np.arange(_WINDOW * 8) + 0.5) / 8
    bank = np.zeros((len(SHAPES), len(SIZES), len(_SCALES), _SUB, _SUB, _WINDOW, _WINDOW), np.float32)
    for index in np.ndindex(*bank.shape[:5]):
        radius = _RADIUS[SIZES[index[1]]] * _SCALES[index[2]]
        cy, cx = (_WINDOW / 2 + k / _SUB for k in index[3:5])
        hit = _inside(SHAPES[index[0]], (fine[None, :] - cx) / radius, (fine[:, None] - cy) / radius)
        bank[index] = hit.reshape(_WINDOW, 8, _WINDOW, 8).mean(axis=(1, 3))
    return bank


def render(scenes: Sequence[Scene], seed: int = 0) -> np.ndarray:
    """Pictures of the scenes, uint8 [n, 32, 32, 3]; ``seed`` drives the small jitters.

    Position (up to 0.75 px), radius (5 %) and colour (a few grey levels) vary from object to object.
    """
    rng = np.random.default_rng(seed)
    n, pad = len(scenes), _WINDOW // 2
    side = IMAGE_SIZE + 2 * pad
    background = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32).reshape(n, 3)
    background = background + rng.uniform(-4, 4, (n, 3)).astype(np.float32)
    canvas = np.broadcast_to(background[:, None, None, :], (n, side, side, 3)).copy()
    bank = _mask_bank()
    for slot in range(2):
        rows = np.array([i for i, s in enumerate(scenes) if len(s.objects) > slot], dtype=int)
        objects = [scenes[i].objects[slot] for i in rows]
        m = len(rows)
        shape = np.array([SHAPES.index(o.shape) for o in objects], dtype=int)
        size = np.array([SIZES.index(o.size) for o in objects], dtype=int)
        colour = np.array([COLOURS[o.colour] for o in objects], np.float32).reshape(m, 3)
        colour = colour + rng.uniform(-6, 6, (m, 3)).astype(np.float32)
        centre = np.array([CENTRES[o.place][::-1] for o in objects], np.float32).reshape(m, 2)
        quarter = np.round((centre + rng.uniform(-0.75, 0.75, (m, 2))) * _SUB).astype(int)
        whole, sub = np.divmod(quarter, _SUB)
        scale = rng.integers(len(_SCALES), size=m)
        mask = bank[shape, size, scale, sub[:, 0], sub[:, 1]][..., None]
        span = np.arange(_WINDOW) - _WINDOW // 2 + pad
        where = (
            rows[:, None, None],
            (whole[:, :1] + span)[:, :, None],
            (whole[:, 1:] + span)[:, None, :],
        )
        canvas[where] += mask * (colour[:, None, None, :] - canvas[where])
    inner = canvas[:, pad : pad + IMAGE_SIZE, pad : pad + IMAGE_SIZE]
    return np.clip(np.round(inner), 0, 255).astype(np.uint8)


def scene_targets(scenes: Sequence[Scene]) -> np.ndarray:
    """Class indices, int64 [n, 16]: for each of the five places (shape or len(SHAPES) for empty,
    colour, size), then the background. Colour and size of an empty place are -100 (ignored)."""
    out = np.full((len(scenes), len(PLACES), 3), -100, dtype=np.int64)
    out[:, :, 0] = len(SHAPES)
    for row, scene in zip(out, scenes, strict=True):
        for o in scene.objects:
            row[PLACES.index(o.place)] = (
                SHAPES.index(o.shape),
                COLOUR_NAMES.index(o.colour),
                SIZES.index(o.size),
            )
    background = np.array([[BACKGROUND_NAMES.index(s.background)] for s in scenes], dtype=np.int64)
    return np.concatenate([out.reshape(len(scenes), -1), background.reshape(-1, 1)], axis=1)
