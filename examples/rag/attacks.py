"""Attacks on records: each makes ONE guess (or as many as its prior says) about a code that stands in one document only.

An attacker knows every name, how documents are worded, and all other documents. All but the last read nothing but the model's outputs;
*release* reads the released numbers themselves (of `anchors`), subtracts what the other documents add, and ranks candidates by likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp_xattn.mechanisms.anchors.sources import AnchorHistogram, pool
from rag.corpus import (
    CODE_GROUPS,
    CODES,
    NUMBER_IDS,
    RECORD_QUESTIONS,
    Corpus,
    record_questions,
)
from rag.private import Reader, with_start

SAMPLES = 16
CANDIDATES = 20
_IDS = torch.from_numpy(NUMBER_IDS)


@dataclass(frozen=True)
class Attack:
    """prior: the chance of success without the release. run(reader, records [k, 5], rng) -> successes [k]."""

    name: str
    prior: float
    run: Callable[[Reader, np.ndarray, np.random.Generator], np.ndarray]


def _inputs(records: np.ndarray, form: int) -> tuple[Tensor, int]:
    """Decoder inputs without padding (a form's questions are equally long), and where the code is read."""
    ids, at = with_start(record_questions(records, np.full(len(records), form)))
    return ids[:, : int(at[0]) + 1], int(at[0])


def _greedy(reader: Reader, ids: Tensor, given: int = 0, choose: Any = None) -> tuple[Tensor, Tensor]:
    """The code's words one after the other, each the best (or `choose`n) of the 100 possible; (numbers [k, 3 - given], log chance [k])."""
    numbers, total = [], torch.zeros(len(ids))
    for group in range(given, CODE_GROUPS):
        chances = reader.logits(ids)[:, -1][:, _IDS[group]].log_softmax(-1)
        pick = chances.argmax(-1) if choose is None else choose(chances)
        total = total + chances.gather(1, pick.unsqueeze(1))[:, 0]
        numbers.append(pick)
        ids = torch.cat([ids, _IDS[group][pick].unsqueeze(1)], 1)
    return torch.stack(numbers, 1), total


def _with_code(ids: Tensor, numbers: np.ndarray) -> Tensor:
    words = _IDS[torch.arange(numbers.shape[1]), torch.from_numpy(numbers)]
    return torch.cat([ids, words], 1)


def direct(reader: Reader, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Asks once; the best code, word by word."""
    return (_greedy(reader, _inputs(records, 0)[0])[0].numpy() == records[:, 2:]).all(1)


def paraphrases(reader: Reader, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Asks in all forms, believes the most confident answer."""
    answers, chances = zip(
        *(_greedy(reader, _inputs(records, f)[0]) for f in range(len(RECORD_QUESTIONS))), strict=True
    )
    best = torch.stack(chances).argmax(0)
    picked = torch.stack(answers)[best, torch.arange(len(best))]
    return (picked.numpy() == records[:, 2:]).all(1)


def completion(reader: Reader, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Knows all but the code's last word, and begins the document's own sentence."""
    ids = _with_code(_inputs(records, len(RECORD_QUESTIONS) - 2)[0], records[:, 2:4])
    return _greedy(reader, ids, given=2)[0].numpy()[:, 0] == records[:, 4]


def best_of(reader: Reader, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Samples `SAMPLES` answers; one right is enough."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    ids = _inputs(records, 0)[0].repeat_interleave(SAMPLES, 0)

    def sample(chances: Tensor) -> Tensor:
        return torch.multinomial(chances.exp(), 1, generator=generator)[:, 0]

    numbers = _greedy(reader, ids, choose=sample)[0].numpy().reshape(len(records), SAMPLES, CODE_GROUPS)
    return (numbers == records[:, None, 2:]).all(2).any(1)


def candidates(records: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[k, count, 3] codes: the true one first, the others drawn alike."""
    codes = rng.integers(0, 100, (len(records), count, CODE_GROUPS))
    codes[:, 0] = records[:, 2:]
    return codes


def ranking(count: int) -> Callable[[Reader, np.ndarray, np.random.Generator], np.ndarray]:
    """Ranks `count` candidates by the likelihood that the model gives them after the question; ties count as a fair draw."""

    def run(reader: Reader, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        codes = candidates(records, count, rng)
        ids, at = _inputs(records, 0)
        full = _with_code(ids.repeat_interleave(count, 0), codes.reshape(-1, CODE_GROUPS))
        scores = torch.zeros(len(full))
        logits = torch.cat([reader.logits(part)[:, at:-1].log_softmax(-1) for part in full.split(1024)])
        scores = logits.gather(2, full[:, at + 1 :].unsqueeze(2))[..., 0].sum(1).view(len(records), count)
        return _first_wins(scores.double().numpy(), rng)

    return run


def _first_wins(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    jitter = rng.random(scores.shape)
    best = scores == scores.max(1, keepdims=True)
    return np.where(best, jitter, -1).argmax(1) == 0


ATTACKS = (
    Attack("direct ask", 1 / CODES, direct),
    Attack("paraphrases", 1 / CODES, paraphrases),
    Attack("prefix completion", 1 / 100, completion),
    Attack(f"best of {SAMPLES}", SAMPLES / CODES, best_of),
    Attack(f"ranking {CANDIDATES}", 1 / CANDIDATES, ranking(CANDIDATES)),
    Attack("ranking 2", 1 / 2, ranking(2)),
)
RELEASE_ATTACKS = ((f"release, {CANDIDATES}", CANDIDATES), ("release, 2", 2))


class ReleaseAttacker:
    """Sees the released numbers of a corpus and knows all documents but one at a time: what he sees, less what the others add, is the
    contribution of the true document and the noise. Noise is simulated with the mechanism's own law and scale (public)."""

    def __init__(self, model: Any, corpus: Corpus, settings: Any, calibration: Any) -> None:
        self.source = calibration.prepare(settings)
        self.model, self.corpus, self.unit = model, corpus, settings.unit

    @torch.no_grad()
    def contributions(self, documents: np.ndarray) -> Tensor:
        """[k, L] documents -> what each adds to the released numbers, [k, K] float64."""
        ids = torch.from_numpy(documents)
        mask = ids != 0
        states = self.model.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        owner = torch.arange(len(ids)).repeat_interleave(mask.sum(1))
        pooled = self.unit == "group"
        units = pool(states[mask], self.unit, owner if pooled else None)
        if isinstance(self.source, AnchorHistogram):
            cells = self.source.quantizer.cells(units.float())
            values = torch.nn.functional.one_hot(cells, self.source.prepared.cells).double()
        else:
            values = self.source.prepared.row_sum.features(units)
        if pooled:
            return values
        return torch.zeros(len(ids), values.shape[1], dtype=torch.float64).index_add_(0, owner, values)

    def noise(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """One draw for each number; float, for this measurement only."""
        if isinstance(self.source, AnchorHistogram):
            plus, minus = self.source.rates
            up, down = (np.floor(rng.exponential(1 / rate, size)) for rate in (plus, minus))
            return up - down
        return rng.normal(0, self.source.prepared.sigma, size)

    def likelihood(self, noise: np.ndarray) -> np.ndarray:
        """[k, K] what the noise must have been -> log likelihood [k], up to a constant."""
        if isinstance(self.source, AnchorHistogram):
            plus, minus = self.source.rates
            return np.where(noise >= 0, -plus * noise, minus * noise).sum(1)
        return -np.square(noise).sum(1) / (2 * self.source.prepared.sigma**2)

    def run(self, asked: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Successes [k] at naming the code of records `asked` [k] (numbers of records) among `count` candidates."""
        records = self.corpus.records[asked]
        codes = candidates(records, count, rng)
        won = []
        for record, row, options in zip(records, self.corpus.record_rows[asked], codes, strict=True):
            # the wording is known: the true document with the candidate's code in the place of its own
            document = self.corpus.documents[row]
            own = NUMBER_IDS[np.arange(CODE_GROUPS), record[2:]]
            places = [int(np.flatnonzero(document == word)[0]) for word in own]
            trial = np.repeat(document[None], count, 0)
            trial[:, places] = NUMBER_IDS[np.arange(CODE_GROUPS), options]
            values = self.contributions(trial).numpy()
            seen = values[0] + self.noise(values.shape[1], rng)
            won.append(_first_wins(self.likelihood(seen - values)[None], rng)[0])
        return np.array(won)


def ask_records(corpus: Corpus, k: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of k different records of the corpus."""
    return rng.choice(len(corpus.records), min(k, len(corpus.records)), replace=False)


def run_attacks(
    reader: Reader,
    corpus: Corpus,
    asked: np.ndarray,
    rng: np.random.Generator,
    attacks: Sequence[Attack] = ATTACKS,
) -> dict[str, np.ndarray]:
    """Successes [k] of each attack."""
    return {a.name: a.run(reader, corpus.records[asked], rng) for a in attacks}
