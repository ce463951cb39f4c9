"""Replies of a decoder-only model to public questions behind public prefixes, and its logits behind decoded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....calibration.anchors.reply_divergence import Replies, keep_likeliest
from ...placeholder import new_tag
from ...private_run import evaluating
from .prefix_attention import Call, Calls
from .prefix_cache import PrefixCache
from .prefix_layers import PrefixLayer
from .prefix_probing import serving, tables_of


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Weights of a model in evaluation mode take no gradients while it lasts; both are restored afterwards."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class PrefixLogits:
    """The model behind a public head and decoded rows: ids [B, T], rows [B, R, C], log weights [B, R] -> logits [B, T, V].

    head: rows [h, C]; offset: positions before the first own token. Called inside `frozen` and `serving` (whose calls these are).
    """

    model: Any
    layers: dict[str, PrefixLayer]
    calls: Calls
    head: torch.Tensor
    offset: int

    def __call__(self, ids: torch.Tensor, rows: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
        return self.behind(rows, log_weights, len(ids))(ids)

    def behind(
        self, rows: torch.Tensor, log_weights: torch.Tensor, batch: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Reads text [batch, T] by and by: each call takes the tokens that follow. A single prefix (B = 1) serves the whole batch."""
        device = self.model.device
        head = self.head.to(rows).expand(len(rows), -1, -1)
        whole = torch.cat([head, rows], 1).to(device, self.model.dtype)
        bias = torch.cat([log_weights.new_zeros(len(rows), head.shape[1]), log_weights], 1).to(device)
        tables = tables_of(self.layers, whole, bias)
        index = torch.arange(batch, device=device) % len(rows)
        cache = PrefixCache([new_tag()], self.offset, len(self.layers), trial=True)

        def read(ids: torch.Tensor) -> torch.Tensor:
            self.calls.current = Call(tables, index, self.offset, cache.suffix + ids.shape[1])
            out = self.model(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
            logits: torch.Tensor = out.logits.to(rows.device)
            return logits

        return read


@dataclass(frozen=True)
class Asking:
    """questions: public token ids of users' turns; count: how many a prefix is asked; steps: the longest reply; end: ids that end one."""

    questions: Sequence[torch.Tensor]
    count: int
    steps: int
    end: tuple[int, ...]

    @property
    def length(self) -> int:
        return max(map(len, self.questions)) + self.steps

    def draw(self, contexts: int, generator: torch.Generator) -> torch.Tensor:
        """[count * contexts, L]: questions of one length, so that they need no padding and a cache serves them."""
        first = self.questions[int(torch.randint(len(self.questions), (1,), generator=generator))]
        alike = [q for q in self.questions if len(q) == len(first)]
        picked = torch.randint(len(alike), (self.count * contexts,), generator=generator).tolist()
        return torch.stack([alike[i] for i in picked]).cpu()


@torch.no_grad()
def ask(
    logits: PrefixLogits, contexts: Sequence[torch.Tensor], asking: Asking, generator: torch.Generator
) -> Replies:
    """`Replies` of some contexts: sampled from the model behind their exact rows, each [n, C] (without the head), all of them at once."""
    lengths = torch.tensor([len(rows) for rows in contexts])
    padded = nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)
    weights = torch.zeros(padded.shape[:2]).masked_fill(
        torch.arange(padded.shape[1]) >= lengths.unsqueeze(1), -torch.inf
    )
    ids = asking.draw(len(contexts), generator)  # text i is about context i % len(contexts)
    begin = ids.shape[1]
    read = logits.behind(padded, weights, len(ids))
    going = torch.ones(len(ids), dtype=torch.bool)
    kept, counted, part = [], [], ids
    for _ in range(asking.steps):
        last = read(part)[:, -1].float()
        kept.append(keep_likeliest(last))
        counted.append(going.float())
        part = torch.multinomial(last.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, part], 1)
        going = going & ~torch.isin(part[:, 0], torch.tensor(asking.end, dtype=part.dtype))
        if not bool(going.any()):
            break
    after = asking.length - begin + 1 - len(kept)

    def each(x: torch.Tensor) -> torch.Tensor:
        """[count * B, ...] -> [B, count, ...]."""
        return x.unflatten(0, (asking.count, len(contexts))).transpose(0, 1)

    def placed(x: torch.Tensor) -> torch.Tensor:
        """[texts, steps, ...] from the question's last token on, in [B, r, T, ...]."""
        return each(nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (begin - 1, after)))

    tops, logs = (torch.stack(x, 1) for x in zip(*kept, strict=True))
    whole = nn.functional.pad(ids, (0, asking.length - ids.shape[1])).int()
    return Replies(each(whole), placed(torch.stack(counted, 1)), placed(tops), placed(logs))


def end_ids(model: Any) -> tuple[int, ...]:
    """Token ids that end a reply, by the model's generation config."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    return tuple(ids) if isinstance(ids, (list, tuple)) else () if ids is None else (int(ids),)


@contextmanager
def replying(
    model: Any, layers: dict[str, PrefixLayer], head: torch.Tensor, offset: int
) -> Iterator[PrefixLogits]:
    """While it lasts, the model can be asked."""
    with frozen(model), serving(model, layers) as calls:
        yield PrefixLogits(model, layers, calls, head, offset)
