"""Other ways to a private system prompt at the same total epsilon of a segment (replace_one), each in its plain form, for comparison only.

* *Per-token response* (as SanText): each of a segment's t tokens is replaced by a token w of a public vocabulary with probability ~
  exp(-epsilon d(x, w) / (2 t D)), d the distance of the model's input embeddings, D the largest distance. Scores lie in an interval of
  length 1, so this exponential mechanism is (epsilon / t)-DP for a token; composition gives epsilon. t is public.
* *Paraphrase with clipped logits* (as DP-Prompt): the chat model paraphrases the segment in exactly PARAPHRASE tokens; each is drawn from
  logits clipped to [top - RANGE, top], top public, at the temperature 2 RANGE PARAPHRASE / epsilon: epsilon / PARAPHRASE each.
* *DP-Fusion* (dp-fusion-lib of PyPI, non-commercial license; only where it is installed): every token of every answer is drawn from a
  mixture of the private and the redacted distribution. As its user would: one private group, which is the whole prompt, its own
  `find_lambda`, and (epsilon, delta) by its own formula, 4 beta a token and log(1 / delta) / (alpha - 1) once, spread over all tokens of
  all answers. Its unit is the whole prompt; a segment's epsilon is not smaller there.
* *kernel_sum*: this package's, without a calibration, segments encoded apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import hf_dp_xattn as dpx

from .replies import TOKENS, Replies

PARAPHRASE = 12  # tokens of a paraphrased segment
RANGE = 10.0
DELTA = 1e-5
REDACTED = "_"


def public_tokens(replies: Replies, texts: Sequence[str]) -> torch.Tensor:
    """Token ids of public texts, each once."""
    return torch.unique(torch.cat([replies.ids(" " + text)[0] for text in texts]))


def token_odds(
    table: torch.Tensor, ids: torch.Tensor, vocabulary: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """[t, V]: probabilities of the public tokens in place of each of a segment's t tokens; epsilon: of the segment."""
    largest = 2 * float(table.norm(dim=1).max())  # of any two embeddings
    distance = torch.cdist(table[ids].double(), table[vocabulary].double())
    return (-distance / largest * (epsilon / (2 * len(ids)))).softmax(-1)


def per_token(
    replies: Replies, segments: Sequence[str], epsilon: float, vocabulary: torch.Tensor
) -> list[str]:
    table = replies.model.get_input_embeddings().weight.detach()
    found = []
    for segment in segments:
        odds = token_odds(table, replies.ids(segment)[0], vocabulary, epsilon)
        found.append(str(replies.tokenizer.decode(vocabulary[torch.multinomial(odds, 1)[:, 0]])))
    return found


@torch.no_grad()
def top_logit(replies: Replies, texts: Sequence[str]) -> float:
    """The mean of the largest logit after public texts."""
    return float(torch.stack([replies.model(replies.ids(t)).logits[0].amax(-1).mean() for t in texts]).mean())


@torch.no_grad()
def paraphrased(replies: Replies, segments: Sequence[str], epsilon: float, top: float) -> list[str]:
    temperature = 2 * RANGE * PARAPHRASE / epsilon
    found = []
    for segment in segments:
        ask = f"<|im_start|>user\nParaphrase this sentence: {segment}<|im_end|>\n<|im_start|>assistant\n"
        ids, cache, said = replies.ids(ask), None, []
        for _ in range(PARAPHRASE):
            out = replies.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = out.logits[0, -1].float().clamp(top - RANGE, top), out.past_key_values
            said.append(int(torch.multinomial((logits / temperature).softmax(-1), 1)))
            ids = torch.tensor([said[-1:]])
        found.append(str(replies.tokenizer.decode(said, skip_special_tokens=True)))
    return found


def fused(exact: torch.Tensor, redacted: torch.Tensor, epsilon: float, answers: int) -> torch.Tensor | None:
    """[tokens, vocabulary]: log-probabilities of DP-Fusion's tokens where it has to give so many answers; None: not installed."""
    try:
        from dp_fusion_lib.utils import find_lambda
    except ImportError:
        return None
    alpha = 1 + 2 * math.log(1 / DELTA) / epsilon  # half of epsilon for the second term, half for the tokens
    beta = epsilon / 2 / (4 * TOKENS * answers)
    rows = []
    for private, public in zip(exact.exp(), redacted.exp(), strict=True):
        share, _ = find_lambda(private, public, alpha, alpha * beta)
        rows.append((share * private + (1 - share) * public).log())
    return torch.stack(rows)


@torch.no_grad()
def summed(
    replies: Replies, segments: Sequence[str], question: str, reply: Sequence[int], epsilon: float
) -> torch.Tensor:
    """[tokens, vocabulary]: log-probabilities along a reply under a kernel_sum release of the segments."""
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", epsilon=epsilon, delta=DELTA, unit="group")
    head = replies.ids("<|im_start|>system\n")[0].tolist()
    rest = torch.cat(
        [replies.ids("<|im_end|>\n"), replies.question(question), torch.tensor([list(reply[:-1])])], 1
    )
    with dpx.protect(replies.model, config, ledger=dpx.Ledger(), allow_uncalibrated=True) as protected:
        private: list[Any] = [replies.ids(s)[0].tolist() for s in segments]
        release = protected.release(private, groups="segments", public_head=head)
        logits = replies.model(**release.inputs(input_ids=rest)).logits[0, -len(reply) :]
    return torch.log_softmax(logits.float(), dim=-1)
