"""Private corpora in the Fusion-in-Decoder model: configs, the shipped calibrations, one release of a corpus, and reading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.encoder_decoder.encoder_outputs import PlaceholderOutputs
from rag.corpus import ATTRIBUTES, FACT_QUESTIONS, VALUE_IDS, Corpus, fact_questions
from rag.model import decode_shared, encode

DELTA = 1e-5
CALIBRATIONS = Path(__file__).parent / "calibrations"


def config(epsilon: float, *, unit: str = "group", mechanism: str = "anchors") -> dpx.DPXAttnConfig:
    """epsilon = inf gives exact attention (not private)."""
    base = dpx.DPXAttnConfig(
        mechanism=mechanism, delta=DELTA, unit=unit, degree=2, projection_dim=8, logit_bound=1.0
    )
    return base.replace(mechanism="none") if np.isinf(epsilon) else base.replace(epsilon=float(epsilon))


def load_calibration(mechanism: str = "anchors", unit: str = "group", documents: int = 256) -> Any:
    """A calibration for corpora of about so many documents; `python examples/rag/calibrate.py` makes it."""
    return dpx.Calibration.from_pretrained(CALIBRATIONS / f"{mechanism}-{unit}-{documents}")


class Reader:
    """Logits of decoder inputs over one corpus, exact (`rows`) or from a release (`inputs`)."""

    def __init__(self, model: Any, *, documents: Tensor | None = None, inputs: dict[str, Any] | None = None):
        self.model, self.inputs = model, inputs
        if documents is not None:
            rows, mask = encode(model, documents)
            self.rows = rows[mask].unsqueeze(0)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[k, m] decoder inputs -> [k, m, V]."""
        if self.inputs is None:
            mask = torch.ones(self.rows.shape[:2], dtype=torch.bool)
            parts = [
                decode_shared(self.model, self.rows, mask, part.unsqueeze(0))[0] for part in ids.split(64)
            ]
            return torch.cat(parts)
        states = self.inputs["encoder_outputs"].last_hidden_state.expand(len(ids), -1, -1)
        mask = self.inputs["attention_mask"].expand(len(ids), -1)
        outputs = PlaceholderOutputs(last_hidden_state=states)
        return self.model(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=ids, use_cache=False
        ).logits


@dataclass(frozen=True)
class Released:
    """A corpus behind a release: what a user and an attacker have."""

    reader: Reader
    handle: Any


@contextmanager
def released(
    model: Any, corpus: Corpus, settings: dpx.DPXAttnConfig, calibration: Any = None
) -> Iterator[Released]:
    """One release of the corpus, each document a group (or its rows units); the model is restored afterwards.

    The corpora are drawn at random and public, and are released again and again to measure: so each time counts for itself (a ledger of its
    own), not with the process.
    """
    documents = torch.from_numpy(corpus.documents)
    public = calibration if settings.is_private else None
    with dpx.protect(
        model,
        settings,
        calibration=public,
        ledger=dpx.Ledger(),
        allow_useless=True,  # a study shows what is not worth it too
        allow_uncalibrated=True,
    ) as protected:
        release = protected.release(
            input_ids=documents, attention_mask=(documents != 0).long(), groups="documents"
        )
        yield Released(Reader(model, inputs=release.inputs()), protected)


def with_start(questions: np.ndarray) -> tuple[Tensor, Tensor]:
    """[k, L] question ids, padded at the end -> decoder inputs [k, L + 1] and the position [k] at which the answer is read."""
    ids = torch.from_numpy(questions)
    return torch.nn.functional.pad(ids, (1, 0)), (ids != 0).sum(1)


def fact_answers(reader: Reader, form: int | None = None) -> np.ndarray:
    """[16, forms] the values that the model names, over the whole vocabulary (-1: a word that is no value of the attribute)."""
    forms = range(len(FACT_QUESTIONS)) if form is None else [form]
    found = []
    for f in forms:
        attributes = np.arange(len(ATTRIBUTES))
        ids, at = with_start(fact_questions(attributes, np.full(len(attributes), f)))
        best = reader.logits(ids)[torch.arange(len(ids)), at].argmax(-1).numpy()
        same = best[:, None] == VALUE_IDS
        found.append(np.where(same.any(1), same.argmax(1), -1))
    return np.stack(found, 1)


def fact_accuracy(reader: Reader, corpus: Corpus) -> np.ndarray:
    """[16] share of the forms of each fact's question that are answered with the value that most documents state."""
    return (fact_answers(reader) == corpus.facts[:, None]).mean(1)
