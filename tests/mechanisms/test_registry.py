"""The registry of mechanisms, and that the one shape holds a mechanism that it has never seen: texts answered from a public list."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from hf_dp_xattn.audit.laws import Context, law_of
from hf_dp_xattn.audit.replay import replayed
from hf_dp_xattn.config import MECHANISMS, DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.known_mechanisms import KNOWN
from hf_dp_xattn.mechanisms.base import GuaranteeNumbers, Integers, Mechanism, NoisePart, State
from hf_dp_xattn.mechanisms.growing_release import grow
from hf_dp_xattn.mechanisms.registry import FEATURES, REGISTRY, STRUCTURES, prepare_release
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bits import Entropy, SeededEntropy
from hf_dp_xattn.privacy.response import RandomizedResponse

LIBRARY = tuple(f"a public text of length {n}" for n in range(12))


@dataclass(frozen=True)
class PublicTexts(Mechanism[Sequence[str]]):
    """The cell of a text is its length. As a context grows, each text is answered when it comes."""

    config: DPXAttnConfig
    response: RandomizedResponse

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(self.response, (self.response.event,)),)

    @property
    def numbers(self) -> GuaranteeNumbers:
        return GuaranteeNumbers(1.0, 1.0, 0.0, "each text is answered by an entry of a public list")

    def count(self, private: Sequence[str], groups: torch.Tensor | None, *, empty: bool = False) -> int:
        return len(private)

    def exact(self, private: Sequence[str], groups: torch.Tensor | None) -> Integers:
        return (torch.tensor([len(text) % len(LIBRARY) for text in private], dtype=torch.int64),)

    def decode(self, noised: Integers, state: State) -> tuple[str, ...]:
        return tuple(LIBRARY[i] for i in noised[0].tolist())

    def growing(self, units: int | None) -> PublicTexts:
        return self


def texts(epsilon: float) -> PublicTexts:
    config = DPXAttnConfig(unit="row", mechanism="anchors", epsilon=epsilon)
    return PublicTexts(config, RandomizedResponse.of(epsilon, len(LIBRARY)))


def config_of(name: str) -> DPXAttnConfig:
    return DPXAttnConfig(mechanism=name, unit=KNOWN[name].units[0])


def test_what_is_known_is_registered() -> None:
    assert set(REGISTRY) == set(KNOWN) == set(MECHANISMS)
    assert set(STRUCTURES) == {"dptree", "kernel_sum"}  # names in files: they stay
    assert set(FEATURES) == {"distance", "positive_random", "taylor"}
    for name, known in KNOWN.items():
        assert config_of(name).is_private is known.private is (name != "none")


def test_the_config_knows_the_mechanisms_without_importing_them() -> None:
    code = (
        "import sys; from hf_dp_xattn.config import DPXAttnConfig, MECHANISMS; DPXAttnConfig(mechanism=MECHANISMS[0]);"
        "assert not [m for m in sys.modules if m.startswith('hf_dp_xattn.mechanisms')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_calibration_is_asked_for_where_one_is_needed() -> None:
    for name, known in KNOWN.items():
        if known.needs_calibration:
            with pytest.raises(ConfigError, match=r"dpx\.calibrate"):
                REGISTRY[name].prepare(config_of(name), (), None)
            with pytest.raises(ConfigError, match="does not release keys and values"):
                prepare_release(config_of(name), [object()])  # type: ignore[list-item]


def test_texts_from_a_public_list_fit_the_shape() -> None:
    prepared, private = texts(19.0), ("abc", "", "four")
    released = prepared.run(private, entropy=SeededEntropy(0))
    assert released.texts == tuple(LIBRARY[len(t)] for t in private)  # misled once in 10^7
    assert released.structures == () and released.context is None
    g = released.guarantee
    assert (g.rows, g.units, g.epsilon, g.is_private) == (3, 3, 19.0, False)
    assert epsilon_of(prepared.events, 0.0) <= 19.0


def test_they_grow_by_answers_of_their_own_units() -> None:
    growing = grow(texts(19.0), 3).open(SeededEntropy(1))
    assert growing.append(("a", "bb")).texts == (LIBRARY[1], LIBRARY[2])
    state = growing.append(("ccc",))
    assert state.texts == (LIBRARY[1], LIBRARY[2], LIBRARY[3])
    assert state.guarantee.units == 3 and growing.prepared.events == texts(19.0).events


def test_they_are_audited_by_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    law = law_of(texts(2.0))
    views = law.views([Context(("abc", "x")), Context(("abcd", "x"))])
    assert views.gap(0, 1) == 1.0
    ratio = views.scores(0, 20_000, SeededEntropy(2))
    assert 0.0 < float((ratio[:, 0] - ratio[:, 1]).mean()) < 2.0
    assert replayed(law, Context(("abc", "x")))

    def silent(self: PublicTexts, exact: Integers, entropy: Entropy) -> Integers:
        return exact

    monkeypatch.setattr(PublicTexts, "noise", silent)
    assert not replayed(law, Context(("abc", "x")))
