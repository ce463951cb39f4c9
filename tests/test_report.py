from __future__ import annotations

import json
import math

from hf_dp_xattn.report import Guarantee, PrivacyReport, promise, rounded_up

GUARANTEE = Guarantee(
    mechanism="kernel_sum",
    epsilon=8.0,
    delta=1e-5,
    unit="row",
    neighboring="replace_one",
    rows=76,
    units=76,
    clip_norm=1.0,
    sensitivity=2.0,
    sigma=1.3,
    sampling_distance=0.0,
    private_noise=True,
    calibrated=True,
)


def report(spent: float | str) -> PrivacyReport:
    release = {
        "name": "context 1",
        "guarantee": GUARANTEE.to_dict(),
        "guarantee_text": GUARANTEE.sentence(),
        "charges": 2,
        "spent_epsilon": spent,
        "delta": 1e-5,
        "spent_delta": 1e-5,
        "details": "clipped",
    }
    return PrivacyReport("Unet", 7, 28, {}, (release,), ("the model",), ("words",), "in memory")


def test_what_is_printed_is_never_less_than_what_was_spent() -> None:
    for spent in (8.00001, 8.0, 17.05940700736536, 0.00001):
        shown = str(report(spent)).split("spent in total: epsilon ")[1].split()[0]
        assert spent <= float(shown) <= spent + 1e-4 + 1e-12
    assert f"{17.05941:.3f}" < "17.0595"  # power: plain rounding would understate


def test_pure_epsilon_is_said_to_be_pure() -> None:
    assert "(8, 0)-differentially private (pure epsilon: delta = 0)" in promise(
        "library", 8.0, 0.0, "group", "replace_one"
    )
    assert "pure" not in promise("library", 8.0, 1e-5, "group", "replace_one")
    assert (
        f"{rounded_up(7.999991):g}" == f"{rounded_up(8.0 + 1e-12):g}" == "8" and rounded_up(8.00001) == 8.0001
    )


def test_a_report_says_what_is_not_covered_and_is_valid_json() -> None:
    made = report("unbounded")
    text = str(made)
    assert "NOT covered" in text and "words" in text and "(8, 1e-05)-differentially private" in text
    assert json.loads(made.to_json()) == made.to_dict()


def test_a_guarantee_survives_json_even_when_it_is_infinite() -> None:
    exact = Guarantee(
        **{**GUARANTEE.__dict__, "mechanism": "none", "epsilon": math.inf, "private_noise": False}
    )
    for g in (GUARANTEE, exact):
        assert Guarantee.from_dict(json.loads(json.dumps(g.to_dict()))) == g
    assert not exact.is_private and "NOT PRIVATE" in exact.sentence()
