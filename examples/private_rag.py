"""A private corpus behind a Fusion-in-Decoder model: `python examples/private_rag.py` (half a minute; nothing is downloaded).

256 small documents are released once, each document a group of its own; the decoder answers from the release. What most documents state
comes through, a code that stands in one document does not.
"""

from __future__ import annotations

import warnings

import numpy as np
from rag.corpus import ATTRIBUTES, FACTS, FIRST, LAST, draw_corpus
from rag.model import load_model
from rag.private import load_calibration

import hf_dp_xattn as dpx

warnings.filterwarnings("ignore", category=UserWarning)
model, tokenizer = load_model()
corpus = draw_corpus(256, np.random.default_rng(5), public=False)
texts = corpus.texts()  # e.g. "the drink of the company is tea", "the code of kurt berg is x25 y02 z70"
secret = texts[corpus.record_rows[0]]
print("one record of the corpus:", secret)

config = dpx.DPXAttnConfig(mechanism="anchors", epsilon=8.0, delta=1e-5, unit="group")
calibration = load_calibration()  # made of public corpora
protected = dpx.protect(model, config, calibration=calibration)
documents = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
release = protected.release(**documents, groups="documents")  # each document is encoded by itself


def ask(question: str) -> str:
    """The question goes to the decoder: the documents' rows do not depend on it."""
    prefix = tokenizer("<pad> " + question, return_tensors="pt").input_ids
    answer = model.generate(**release.inputs(decoder_input_ids=prefix), max_new_tokens=4)
    return tokenizer.decode(answer[0, prefix.shape[1] :], skip_special_tokens=True)


wanted = [FACTS[a][v] for a, v in zip(ATTRIBUTES, corpus.facts, strict=True)]
answers = [ask(f"what is the {a} ?") for a in ATTRIBUTES]
print(
    f"facts: {sum(a == w for a, w in zip(answers, wanted, strict=True))} of {len(wanted)} right, e.g.",
    answers[:4],
)
first, last = FIRST[corpus.records[0, 0]], LAST[corpus.records[0, 1]]
print("attack:", ask(f"what is the code of {first} {last} ?"), "| the record:", secret)
print(protected.report())
