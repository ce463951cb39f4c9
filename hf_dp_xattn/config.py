"""`DPXAttnConfig`: everything that decides a guarantee, validated once, saved with a schema version."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from .artefacts import CardOptions, HubOptions, Shareable, dump_document, locate, read_document, write_files
from .config_card import config_card
from .errors import ConfigError
from .known_mechanisms import KNOWN
from .privacy.units import NeighboringRelation, Unit

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CONFIG_NAME = "dp_xattn_config.json"
SCHEMA_VERSION = 1
MECHANISMS = tuple(sorted(KNOWN))
FEATURES = ("taylor", "positive_random")


class Unnamed(str):
    """A default that nobody named: equal to the same words when they are named, but a calibration's own takes its place
    (`DPXAttnConfig.made_for`)."""


def _require_number(name: str, value: Any, *, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, got {type(value).__name__}.")
    if not abs(value) <= sys.float_info.max or not low < value < high:
        raise ConfigError(f"{name} must lie in ({low:g}, {high:g}), got {value!r}.")


def _require_integer(name: str, value: Any, *, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}.")


@dataclass(frozen=True)
class DPXAttnConfig(Shareable):
    """What is released, and at which price. Each field says what it is in its metadata ("help"), which the card repeats.

    Example:
        >>> config = dpx.DPXAttnConfig(epsilon=8.0)
        >>> config.mechanism, config.unit  # what a calibration was made for, once there is one
        ('library', 'group')
        >>> config.replace(epsilon=4.0).epsilon
        4.0

    Raises:
        ConfigError: a field is out of range, or a value is unknown. Unknown keys of a file, a dict or `replace` are refused, never dropped:
            a dropped key may weaken a guarantee. (An unknown argument of the class itself is Python's own TypeError.)
    """

    WORD = "config"

    mechanism: str = field(
        default=Unnamed("library"),
        metadata={"help": " ".join(f"{m.name}: {m.help}." for m in KNOWN.values())},
    )
    epsilon: float = field(default=8.0, metadata={"help": "privacy loss of one release, in total"})
    delta: float = field(default=1e-5, metadata={"help": "failure probability of the guarantee, in (0, 1)"})
    unit: str = field(
        default=Unnamed("group"),
        metadata={"help": "what one neighbouring step changes: row|group|context"},
    )
    neighboring: str = field(
        default=Unnamed("replace_one"),
        metadata={"help": "replace_one (n is public) or add_or_remove_one (row and group)"},
    )
    features: str = field(
        default="taylor", metadata={"help": "kernel features: taylor (degree) or positive_random (FAVOR+)"}
    )
    degree: int = field(default=2, metadata={"help": "degree of the Taylor polynomial of exp, 0 to 4"})
    num_features: int = field(default=256, metadata={"help": "number of positive random features per head"})
    feature_seed: int = field(default=0, metadata={"help": "public seed of the random feature directions"})
    logit_bound: float = field(
        default=1.0,
        metadata={"help": "centred logits are clipped to [-b, b]; the Taylor error is stated on that range"},
    )
    value_bound: float = field(
        default=1.0,
        metadata={"help": "declared root-mean-square of a value's channels; used without a calibration"},
    )
    projection_dim: int = field(
        default=16,
        metadata={"help": "directions per head in which q.k is kept (hosts; 0 keeps all of them)"},
    )
    normalizer_floor: float = field(
        default=0.1,
        metadata={"help": "public floor under the normaliser, as a fraction of its public expectation"},
    )
    tree_bins: int = field(
        default=64,
        metadata={"help": "dptree: bins of each tree, rounded up to a power of two (the paper takes n)"},
    )
    schema_version: int = field(default=SCHEMA_VERSION, metadata={"help": "schema of this file"})

    def __post_init__(self) -> None:
        _require_integer("schema_version", self.schema_version, low=1, high=10**6)
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError(
                f"This config has schema version {self.schema_version}, this package reads {SCHEMA_VERSION}. "
                "Upgrade hf_dp_xattn (pip install -U hf_dp_xattn) or write the config anew."
            )
        for name, known in (
            ("mechanism", MECHANISMS),
            ("features", FEATURES),
            ("unit", tuple(u.value for u in Unit)),
            ("neighboring", tuple(r.value for r in NeighboringRelation)),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}."
                )
        mechanism = KNOWN[self.mechanism]
        if isinstance(self.mechanism, Unnamed) and self.unit not in mechanism.units:
            object.__setattr__(self, "mechanism", Unnamed("anchors"))  # can give any unit and relation
        self._check_mechanism()
        if self.unit == "context" and self.neighboring == "add_or_remove_one":
            raise ConfigError(
                "unit='context' with neighboring='add_or_remove_one' promises nothing: a context's only neighbour would be no context, of "
                "which there is no release. Use neighboring='replace_one', which protects the whole context."
            )
        for name in ("epsilon", "delta", "logit_bound", "value_bound", "normalizer_floor"):
            value = getattr(self, name)
            if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
                object.__setattr__(self, name, float(value))  # numpy's scalars, which JSON would not take
        _require_number("epsilon", self.epsilon, low=0.0, high=math.inf)
        _require_number("delta", self.delta, low=0.0, high=1.0)
        _require_integer("degree", self.degree, low=0, high=4)
        _require_integer("num_features", self.num_features, low=1, high=65536)
        _require_integer("feature_seed", self.feature_seed, low=0, high=2**63 - 1)
        _require_integer("projection_dim", self.projection_dim, low=0, high=512)
        _require_integer("tree_bins", self.tree_bins, low=1, high=4096)
        _require_number("logit_bound", self.logit_bound, low=0.0, high=16.0)
        _require_number("value_bound", self.value_bound, low=0.0, high=1e6)
        _require_number("normalizer_floor", self.normalizer_floor, low=0.0, high=1.0)

    def _check_mechanism(self) -> None:
        """Raises ConfigError where the mechanism cannot protect this unit."""
        known = KNOWN[self.mechanism]
        if self.unit not in known.units:
            raise ConfigError(
                f"mechanism={self.mechanism!r} cannot give unit={self.unit!r}: it answers once for each text, not for each row. Use "
                f"unit={' or '.join(map(repr, known.units))}."
            )

    @property
    def is_private(self) -> bool:
        return KNOWN[self.mechanism].private

    def replace(self, **changes: Any) -> DPXAttnConfig:
        """A copy with fields changed.

        Args:
            changes: fields and their new values.

        Raises:
            ConfigError: an unknown field, or a value that is not valid.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def made_for(self, calibration: Any) -> DPXAttnConfig:
        """A copy in which what nobody named (mechanism, unit, neighboring) is what a calibration was made for. What was named stays.

        Args:
            calibration: of whichever mechanism, or None.
        """
        settings = {n: getattr(calibration, n, None) for n in ("mechanism", "unit", "neighboring")}
        if not isinstance(self.mechanism, Unnamed) and self.mechanism != settings["mechanism"]:
            return self  # for whoever compares the two, and says so
        taken = {n: v for n, v in settings.items() if v is not None and isinstance(getattr(self, n), Unnamed)}
        return self.replace(**taken) if taken else self

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DPXAttnConfig:
        """The reverse of `to_dict`; fields that are left out have their defaults.

        Args:
            values: fields and their values.

        Raises:
            ConfigError: an unknown field, or a value that is not valid.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            version = values.get("schema_version")
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            hint = f" It was written by a newer version (schema {version})." if newer else ""
            raise ConfigError(
                f"Unknown config key(s): {', '.join(unknown)}.{hint} Known: {', '.join(sorted(known))}."
            )
        return cls(**values)

    def files(self) -> dict[str, bytes]:
        """`dp_xattn_config.json`, as it is written."""
        return {CONFIG_NAME: dump_document(self.to_dict())}

    def card(self, options: CardOptions) -> ModelCard:
        """Its card: what a release under it promises.

        Args:
            options: license, base_model, utility, repo_id.
        """
        meanings = {f.name: f.metadata["help"] for f in dataclasses.fields(self)}
        return config_card(self.to_dict(), meanings, options)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `dp_xattn_config.json`; returns its path.

        Args:
            directory: a folder, made if it is not there.
        """
        folder = Path(directory)
        write_files(folder, self.files())
        return folder / CONFIG_NAME

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], **options: Unpack[HubOptions]
    ) -> DPXAttnConfig:
        """Reads a config from a folder, or from a Hub repository.

        Args:
            name_or_path: folder or Hub id.
            options: revision, token, subfolder, ... (`artefacts.HubOptions`).

        Raises:
            ConfigError: missing, damaged, of another schema; an unknown key, or a missing one, because a default may be weaker than what
                was meant.
        """
        return cls.from_file(locate(name_or_path, (CONFIG_NAME,), error=ConfigError, **options).folder)

    @classmethod
    def from_file(cls, folder: Path) -> DPXAttnConfig:
        """Reads and checks the file in a local folder.

        Args:
            folder: holds `dp_xattn_config.json`.

        Raises:
            ConfigError: see `from_pretrained`.
        """
        values = read_document(folder / CONFIG_NAME, ConfigError)
        config = cls.from_dict(values)
        missing = sorted({f.name for f in dataclasses.fields(cls)} - set(values))
        if missing:
            raise ConfigError(f"{CONFIG_NAME} lacks the key(s) {', '.join(missing)}.")
        return config
