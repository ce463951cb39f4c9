r"""`anchors`: one release of the context's rows for all layers and heads, decoded to a few rows that ordinary attention reads.

*Source.* Ours; for each epsilon the calibration chose one of

* **sum** (B): y = sum_u f(x_u) + N_Z(0, sigma^2 I), `row_sum.py`;
* **response**: each unit's cell by k-ary randomised response, `privacy/response.py`; with S codebooks (the second one quantises what the
  first left over, and so on) it answers S times at epsilon / S each, by basic composition;
* **histogram** (A, C): counts over public cells with geometric noise, `histogram.py`;
* **mixed**: such counts, and a sum beside them, `mixed.py`.

*Formal guarantee.* **Released:** that y, and nothing else. **Unit:** a row; or a group or the context, which enters as ONE row, the
mean of its rows (an exact function of the unit alone, `sources.pool`); `mixed` is for rows. **Neighbouring relation:** replace_one, or
add_or_remove_one for sum and histogram (`response` answers once for each unit and `mixed` reads a mean, so both need a public number of
units and are refused by name). **Sensitivity, noise, theorem:** stated in the modules. Decoding, pruning and all attention is
post-processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ..base import LayerSpec
from .mixed import AnchorMixed
from .plan import AnchorPlan, Decoders
from .sources import AnchorHistogram, AnchorResponse, AnchorSum, PreparedAnchors

NO_CALIBRATION = (
    "mechanism='anchors' needs a calibration: its codebook, encoder and decoder are fitted to PUBLIC contexts. Make one with "
    "dpx.calibrate(pipe, public_contexts, config), or load a shared one with dpx.Calibration.from_pretrained(...)."
)
KINDS: dict[str, type[PreparedAnchors]] = {
    "sum": AnchorSum,
    "response": AnchorResponse,
    "histogram": AnchorHistogram,
    "mixed": AnchorMixed,
}


def nearest_plan(plans: Sequence[AnchorPlan], epsilon: float) -> AnchorPlan:
    """The plan made for the epsilon nearest to this one (in ratio). Any plan is private at any epsilon; the nearest is the most useful."""
    return min(plans, key=lambda p: max(p.epsilon / epsilon, epsilon / p.epsilon))


def prepare_anchors(
    config: DPXAttnConfig, plans: Sequence[AnchorPlan], decoders: Decoders
) -> PreparedAnchors:
    """What `anchors` releases at config.epsilon. Raises ConfigError where the plan cannot give the config's guarantee."""
    if not plans:
        raise ConfigError(NO_CALIBRATION)
    plan = nearest_plan(plans, config.epsilon)
    return KINDS[plan.release].of(config, plan, decoders)


def prepare(config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: Any) -> PreparedAnchors:
    """The calibration holds the plans and decoders; no layer takes part. Raises ConfigError where there is none."""
    if calibration is None:
        raise ConfigError(NO_CALIBRATION)
    prepared: PreparedAnchors = calibration.prepare(config)
    return prepared
