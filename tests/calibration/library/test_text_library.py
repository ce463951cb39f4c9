"""Libraries: what they are made of, resumed, saved, loaded and damaged; plans that held-out contexts choose."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.checkpoints import Checkpoints
from hf_dp_xattn.calibration.library import encoding, library_plans
from hf_dp_xattn.calibration.library.levels import medoids
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.calibration.library.library_plans import Ranked, places_for, sizes_for
from hf_dp_xattn.calibration.library.stored_plan import JointPlan
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.rank_response import RankResponse

from ...mechanisms.library.worlds import CHANNELS, TOPICS, contexts, encode, library

CONFIG = dpx.DPXAttnConfig(mechanism="library", unit="group")
QUIET = LibraryOptions(epsilons=(2.0,), encoder="toy", progress=False)


def test_a_library_answers_as_its_plan_predicts() -> None:
    """Distortion of public contexts that no library holds, by simulation with fresh coins."""
    own = library(epsilons=(4.0,))
    prepared = own.prepare(CONFIG.replace(epsilon=4.0))
    units = [f"rule {i} of {TOPICS[i % 6]}" for i in range(300, 900)]
    released = prepared.run(encode(units), groups=torch.arange(600), entropy=SeededEntropy(2)).texts
    z = [(encode(t) - own.center) @ own.projection for t in (units, list(released))]
    found = 1.0 - float(torch.nn.functional.cosine_similarity(*z).mean())
    plan = own.plans[0].quality
    assert plan.low - 0.15 < found < plan.high + 0.15
    assert plan.exact < plan.distortion < 1.0


def test_more_epsilon_is_never_predicted_to_be_worse() -> None:
    distortions = [p.quality.distortion for p in library(epsilons=(0.5, 2.0, 8.0, 19.0)).plans]
    assert distortions == sorted(distortions, reverse=True)


def test_round_trip(tmp_path: Path) -> None:
    own = library()
    own.save_pretrained(tmp_path)
    for read in (dpx.TextLibrary.from_pretrained(tmp_path), dpx.Calibration.from_pretrained(tmp_path)):
        assert isinstance(read, dpx.TextLibrary)
        assert read.texts == own.texts and read.files() == own.files()
        read.check_encoder(encode)
    card = (tmp_path / "README.md").read_text()
    assert "Predicted on public contexts that were held out" in card


@pytest.mark.parametrize("stem", ["dp_xattn_calibration.json", "dp_xattn_calibration.safetensors"])
def test_damage_is_refused(tmp_path: Path, stem: str) -> None:
    library().save_pretrained(tmp_path)
    file = tmp_path / stem
    file.write_bytes(file.read_bytes()[:-9] + b" " * 9)
    with pytest.raises(ConfigError):
        dpx.TextLibrary.from_pretrained(tmp_path)


def other(**changes: object) -> dpx.TextLibrary:
    return dataclasses.replace(library(epsilons=(4.0,)), **changes)  # type: ignore[arg-type]


def plan(**changes: object) -> dpx.TextLibrary:
    own = library(epsilons=(4.0,))
    return dataclasses.replace(own, plans=(dataclasses.replace(own.plans[0], **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: other(unit="row"),
        lambda: other(grouping="words"),
        lambda: other(plans=()),
        lambda: other(texts=("a", "a")),
        lambda: other(lengths=(5, 3)),
        lambda: other(reach=float("nan")),
        lambda: other(center=torch.full((CHANNELS,), float("nan"))),
        lambda: other(codes=torch.zeros(3, 2, dtype=torch.int8)),
        lambda: plan(shelves=((0, 0),)),
        lambda: plan(shelves=((0, 10**6),)),
        lambda: plan(shelves=((10**6, 1),)),
        lambda: plan(shelves=((0, 1),) * 3),
        lambda: plan(answers=5),
        lambda: plan(lists=(torch.tensor([1, 0]),)),
        lambda: plan(lists=(torch.tensor([0, 10**6]),)),
        lambda: plan(lists=(torch.tensor([[0, 1]]),)),
        lambda: plan(joint=(JointPlan((0,), 0),)),
        lambda: plan(epsilon=-1.0),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make().verify()  # type: ignore[operator]


def test_another_encoder_is_refused() -> None:
    own = library(epsilons=(4.0,))
    with pytest.raises(ConfigError, match="cosine"):
        own.check_encoder(lambda texts: encode(texts).flip(1))
    with pytest.raises(ConfigError, match="gives"):
        own.check_encoder(lambda texts: encode(texts)[:, :3])


def test_a_run_that_broke_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 7)
    options = dataclasses.replace(QUIET, kept=Checkpoints(tmp_path))
    calls: list[int] = []

    def breaking(texts: Sequence[str]) -> torch.Tensor:
        calls.append(len(texts))
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return encode(texts)

    with pytest.raises(RuntimeError):
        build_library(contexts(), breaking, CONFIG, options)
    resumed = build_library(contexts(), breaking, CONFIG, options)
    plain = build_library(contexts(), encode, CONFIG, QUIET)
    texts = len(plain.texts)
    # each text once, the broken chunk twice, and the probe
    timed = 2 * (1 + 8)  # texts by which each of the two runs told how long it would take
    assert sum(calls) == texts + 7 + len(plain.probe) + timed
    assert resumed.files() == plain.files()


def test_recombination_is_part_of_the_library() -> None:
    public = [[f"a {c} {s}"] for c in ("red", "blue", "green") for s in ("star", "cross", "disc")][:-1]
    grown = build_library(public, encode, CONFIG, dataclasses.replace(QUIET, expand=True))
    assert "a green disc" in grown.texts and grown.settings["recombined"] == 1
    assert "a green disc" not in build_library(public, encode, CONFIG, QUIET).texts


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ([], "2 to"),
        (["only one"], "2 to"),
        (["twice", "twice"], "2 to"),
        ([["a", ""]], "none of them empty"),
        ([[]], "none of them empty"),
        ([[1, 2, 3]], "token ids must be decoded"),
    ],
)
def test_bad_public_texts(public: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_library(public, encode, CONFIG, QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (lambda texts: torch.full((len(texts), 4), float("nan")), "NaN or Inf"),
        (lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64), "float tensor"),
        (lambda texts: encode(texts)[:1], "float tensor"),
        (lambda texts: torch.ones(len(texts), 4), "the same code"),
    ],
    ids=["NaN", "integers", "too few", "all alike"],
)
def test_bad_encoders(codes: encoding.Encode, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_library(contexts(), codes, CONFIG, QUIET)


def test_expected_is_the_sum_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_plans, "_BLOCK", 20)  # several blocks, and a rest
    response = RankResponse.of(2.0, 9, 3)
    generator = torch.Generator().manual_seed(0)
    units, entries = (torch.nn.functional.normalize(torch.randn(n, 4, generator=generator)) for n in (5, 9))
    by_rank = (units @ entries.T).sort(dim=1, descending=True).values
    naive = [response.expect(row.numpy()) for row in by_rank]
    assert Ranked.of(units, entries).expected(response).tolist() == pytest.approx(naive, abs=1e-6)


def test_medoids_are_clusters_and_lean_to_the_middle_at_small_epsilon() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.eye(8) + 0.4, dim=1)
    codes = centers.repeat(40, 1) + 0.05 * torch.randn(320, 8, generator=generator)
    codes = torch.nn.functional.normalize(codes, dim=1)
    weights = torch.ones(320)
    found = medoids(codes, weights, 8, epsilon=10.0)
    assert sorted((found % 8).tolist()) == list(range(8))
    middle = torch.nn.functional.normalize(codes.mean(0), dim=0)

    def lean(epsilon: float) -> float:
        return float((codes[medoids(codes, weights, 8, epsilon)] @ middle).mean())

    assert lean(0.1) > lean(10.0)
    weights[100:] = 0.0  # these may not answer
    assert int(medoids(codes, weights, 8, epsilon=4.0).max()) < 100


def test_sizes_and_places() -> None:
    assert sizes_for(0.5) == [2, 3] and max(sizes_for(64.0)) == 6144 > max(sizes_for(6.0))
    assert places_for([3] * 10).size == 4
    lengths = places_for([*range(1, 31)] * 3).lengths
    assert lengths == (11, 21)


def test_a_place_that_few_texts_tell_has_a_short_list() -> None:
    """Every context ends with one of two texts, and begins with one of many: the last place's list is short, and tells them."""
    generator = torch.Generator().manual_seed(0)
    public = [
        [
            f"rule {int(torch.randint(400, (1,), generator=generator))} of {TOPICS[c % 5]}",
            ("tea", "sea")[c % 2],
        ]
        for c in range(200)
    ]
    own = build_library(public, encode, CONFIG, dataclasses.replace(QUIET, epsilons=(6.0,)))
    prepared = own.prepare(CONFIG.replace(epsilon=6.0))
    first, last = (prepared.shelves[prepared.places.shelf(i, 2)] for i in (0, 1))
    assert len(last.texts) < len(first.texts) and {"tea", "sea"} <= set(last.texts)
    rows = encode(["rule 3 of tax", "tea"])
    texts = [
        prepared.run(rows, groups=torch.arange(2), entropy=SeededEntropy(i)).texts[1] for i in range(100)
    ]
    assert texts.count("tea") > 90


def test_a_context_in_parts_is_answered_together_and_better_than_by_shares() -> None:
    config = dpx.DPXAttnConfig(mechanism="library", unit="context", epsilon=8.0)
    options = dataclasses.replace(QUIET, epsilons=(8.0,), grouping="lines")
    own = build_library(contexts(60, 3), encode, config, options)
    own.verify()
    assert dpx.TextLibrary.from_parts(own.header(), own.tensors()).files() == own.files()
    units = [f"rule {i} of {TOPICS[i % 6]}" for i in range(300, 303)]
    z = [(encode(units) - own.center) @ own.projection]
    means = []
    for made in (own, dataclasses.replace(own, plans=(dataclasses.replace(own.plans[0], joint=()),))):
        prepared = made.prepare(config, units=3)
        assert epsilon_of(prepared.events, 0.0) <= 8.0 * (1 + 1e-9)
        found = [prepared.run(encode(units), entropy=SeededEntropy(i)).texts for i in range(200)]
        codes = [(encode(t) - own.center) @ own.projection for t in found]
        means.append(
            float(torch.stack([torch.nn.functional.cosine_similarity(z[0], c) for c in codes]).mean())
        )
    assert means[0] > means[1] + 0.02
    assert own.prepare(config, units=40).joint is None  # longer than any that was planned: each by its share


def test_texts_that_the_host_treats_alike_count_as_near() -> None:
    """A code that says in which of many ways a topic is put, louder than the topic: the responses tell what matters."""

    def loud(texts: Sequence[str]) -> torch.Tensor:
        own = encode([f"{t} x" for t in texts])
        own[:, :3] *= 40.0  # of three topics and of what is a text's own
        return own

    def responses(texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[float(topic in t) for topic in TOPICS[3:]] for t in texts])

    public = [[f"rule {i} of {TOPICS[3 + i % 3]}"] for i in range(300)]
    units = [f"rule {i} of {TOPICS[3 + i % 3]}" for i in range(400, 460)]
    right = []
    for given in (None, responses):
        options = dataclasses.replace(QUIET, epsilons=(3.0,), flatten=0.0, responses=given)
        prepared = build_library(public, loud, CONFIG, options).prepare(CONFIG.replace(epsilon=3.0))
        texts = prepared.run(loud(units), groups=torch.arange(60), entropy=SeededEntropy(0)).texts
        right.append(sum(a[-3:] == b[-3:] for a, b in zip(units, texts, strict=True)))
    assert right[1] > right[0] + 10
    with pytest.raises(ConfigError, match="finite floats"):
        build_library(public, loud, CONFIG, dataclasses.replace(QUIET, responses=lambda t: torch.zeros(1, 2)))


def test_the_header_is_read_by_people(tmp_path: Path) -> None:
    library(epsilons=(4.0,)).save_pretrained(tmp_path)
    header = json.loads((tmp_path / "dp_xattn_calibration.json").read_text())
    assert header["kind"] == "library" and header["encoder"] == "toy"


def test_rounding_of_a_text_that_is_its_own_entry_can_be_saved(tmp_path: Path) -> None:
    """1 - cosine of a code with itself may be -1e-8, which a reader refuses."""
    own = library(epsilons=(4.0,))
    tiny = dataclasses.replace(own.plans[0].quality, exact=-1.4e-8)
    plan = dataclasses.replace(own.plans[0], quality=tiny)
    dataclasses.replace(own, plans=(plan,)).save_pretrained(tmp_path)
    assert dpx.TextLibrary.from_pretrained(tmp_path).plans[0].quality.exact == 0.0
    with pytest.raises(ConfigError):
        worse = dataclasses.replace(own.plans[0].quality, exact=-0.1)
        dataclasses.replace(own, plans=(dataclasses.replace(plan, quality=worse),)).verify()
