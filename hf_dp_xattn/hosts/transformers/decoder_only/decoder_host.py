"""`DecoderHost`: a decoder-only model, whose private context is a prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....errors import ConfigError, ProtectionLostError, ReleaseError
from ....records import records_of
from ...content_names import with_texts
from ...context import PrivateContext
from ...fingerprint import Fingerprint
from ...host import Named, Readable
from ...host_words import HostWords, Setting, prefix_words
from ...layer import Layer
from ...placeholder import Tag
from ...private_run import evaluating
from ...released import ReleasedContext
from ...tables import LayerTable
from ...weight_changes import refuse_call_adapters
from ..generating import check_public_ids
from ..reading import LayerState
from ..routed_host import RoutedHost
from ..routing import Routing
from .chat import private_message, split_chat
from .prefix_attention import LAYER_ATTRIBUTE, NAME, Call, Calls, check_window, dp_xattn_prefix
from .prefix_cache import PrefixCache
from .prefix_contexts import check_groups, name_prefix, read_prefixes
from .prefix_encoder import PrefixEncoder
from .prefix_generation import NO_INPUTS, REFUSED, REFUSED_IN_CALLS, GenerateShadow, infer_mask
from .prefix_layers import device_of, prefix_fingerprint
from .prefix_probing import ON_META, find_layers

OTHER_TOKENS = (
    "generate was given {expected} own tokens and would run the model on {given} of them: something between the two changes its inputs. "
    "Call generate of the protected model itself."
)


class DecoderHost(RoutedHost):
    """A decoder-only model of transformers.

    A private prefix (a system prompt, documents, examples) is released once; `generate` then runs with `release.inputs(input_ids=...)`:
    the prefix's tokens, keys and values never enter it. Every layer, beam, sample, step and turn reads the release.
    """

    routing = Routing(NAME, LAYER_ATTRIBUTE, dp_xattn_prefix)
    projects_rows = False  # a row IS keys and values, of the weights that it was made with
    never_traced = "The gate of a protected decoder-only model is never traced: torch.compile runs it with fullgraph=False only."
    calls: Calls

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoder = PrefixEncoder(model, self.own_layers)
        self.calls = Calls()
        self.generate = GenerateShadow(self)

    def find_layers(self) -> dict[str, Layer]:
        self.own_layers = find_layers(self.model)
        return dict(self.own_layers)

    def watched(self) -> list[torch.nn.Module]:
        """A prefix's keys and values come from all of the model's body."""
        return [self.model.base_model]

    def sketch(self) -> Fingerprint:
        """It costs a short run of the model. Raises ConfigError where there are no weights to run."""
        if device_of(self.model).type == "meta":
            raise ConfigError(
                f"The model's weights are gone ({ON_META}). Load them again; nothing was spent."
            )
        with evaluating(self.model):
            return prefix_fingerprint(self.model, self.own_layers)

    @property
    def channels(self) -> int:
        return next(iter(self.layers.values())).channels

    @property
    def limit(self) -> int | None:
        """How many positions the model's layers see at once; None: as many as there are."""
        return self.encoder.limit

    # ---- a forward ---------------------------------------------------------------------------------------------------------

    def layer_state(self, name: str) -> LayerState:
        return LayerState(name, self.calls, self.originals[name], self.guard.access)

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self.begin(module, args, kwargs)
        cache = inputs.get("past_key_values")
        if not isinstance(cache, PrefixCache):
            if not self.guard.access.public:
                raise ProtectionLostError(NO_INPUTS)
            self.calls.current = Call({}, torch.zeros(0, dtype=torch.int64), public=True)
            return
        refuse_call_adapters(self.watched())
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or inputs.get("use_cache") is False:
            raise ConfigError(
                "A protected model takes input_ids and the cache of release.inputs(), not inputs_embeds or use_cache=False."
            )
        for name in () if self.calls.generating else REFUSED_IN_CALLS:
            if inputs.get(name) is not None:
                raise ConfigError(f"{name} is not supported on a protected model: {REFUSED[name]}.")
        batch, queries = ids.shape
        if cache.expected not in (None, queries):
            raise ProtectionLostError(OTHER_TOKENS.format(given=queries, expected=cache.expected))
        cache.expected = None
        cache.fit(batch)
        length = cache.suffix + queries
        total = cache.offset + length
        if len(cache.index) != batch:
            raise ProtectionLostError(
                f"A batch of {batch} was passed with the inputs of {len(cache.index)} release(s). Call release.inputs(input_ids=ids) "
                "for each batch."
            )
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (batch, total)):
            raise ConfigError(
                f"attention_mask must be [{batch}, {total}] as release.inputs(...) gives it: public head, padded prefix, own tokens."
            )
        check_window(self.limit, total)
        visible = None if mask is None else mask[:, cache.offset :].to(torch.bool)
        tables = self._read(cache, ids.device)
        cache.read_by(self.calls)
        self.calls.current = Call(
            tables, cache.index.to(ids.device), cache.offset, length, visible, cache=cache
        )

    def _read(self, cache: PrefixCache, device: torch.device) -> dict[str, LayerTable]:
        """The tables that `serve` made for this cache last, as long as the weights are the same; or new ones: in a direct call, for the
        first tokens of a cache."""
        served, begun = self.calls.served, cache.suffix > 0 or self.calls.generating
        if begun and served is not None and served[0] == self._served_for(cache.tags, device):
            return served[1]
        return self.serve(cache)

    def _served_for(self, tags: tuple[Tag, ...], device: torch.device) -> object:
        return tags, device, self.weights.state()

    def serve(self, cache: PrefixCache) -> dict[str, LayerTable]:
        """Makes what a cache names readable by the layers. Raises as `Guard.build` does."""
        device = device_of(self.model)
        tables = self.guard.build(cache.tags, device)
        self.calls.served = self._served_for(cache.tags, device), tables
        return tables

    # ---- private contexts --------------------------------------------------------------------------------------------------

    def name(  # type: ignore[override]
        self,
        context: Any,
        groups: Any,
        *,
        public_head: Any = 0,
        prefix_bucket: int | None = None,
        text: str | Sequence[str] | None = None,
    ) -> Named:
        size = self.model.get_input_embeddings().num_embeddings
        prefixes = read_prefixes(context, groups, public_head, prefix_bucket, size)
        row_groups = check_groups(groups, prefixes)
        apart = isinstance(groups, str)
        named = [name_prefix(p, self.encoder, self.guard.config.unit, apart=apart) for p in prefixes]
        named = with_texts(named, text, len(prefixes[0].segments) if apart else None)
        return Named([dataclasses.replace(c, encoder=(self.model.base_model,)) for c in named], row_groups)

    def check_growing(self, contexts: Sequence[PrivateContext]) -> None:
        raise ConfigError("A prefix that grows is not supported on a decoder-only model.")

    def finished(self, released: ReleasedContext) -> ReleasedContext:
        released = super().finished(released)
        if self.guard.config.unit == "row":
            return released
        # the padded length is public, the number of tokens need not be
        return dataclasses.replace(released, guarantee=dataclasses.replace(released.guarantee, rows=None))

    # ---- what is read ------------------------------------------------------------------------------------------------------

    def inputs(
        self, release: Readable, prompt: str | Sequence[str] | None = None, **public: Any
    ) -> dict[str, Any]:
        """See `Release.inputs`. input_ids [B, m] (and attention_mask [B, m]): the user's own PUBLIC tokens, all of the conversation after
        the system prompt; one release serves all of them, or there is one for each. Anything else is passed on.

        Without an attention_mask, pads are left out where the unprotected model's `generate` would: its pad_token_id is set (in `public`,
        or in the generation config) and none of its eos_token_id. Where these two are one, padded texts need their mask.

        Returns:
            input_ids, attention_mask (which counts head and padded prefix), past_key_values (a `PrefixCache`: the release's name).
        """
        if prompt is not None:
            raise ConfigError(
                "A model has no tokenizer: pass the user's text as input_ids (and attention_mask)."
            )
        ids, mask = public.pop("input_ids", None), public.pop("attention_mask", None)
        if not isinstance(ids, torch.Tensor) or ids.ndim not in (1, 2) or ids.shape[-1] == 0:
            raise ConfigError("Pass the user's tokens: release.inputs(input_ids=ids) with ids [B, m] or [m].")
        check_public_ids("input_ids", ids, self.model)
        ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
        mask = infer_mask(self.model, ids, public) if mask is None else torch.atleast_2d(mask).to(ids)
        if mask.shape != ids.shape:
            raise ConfigError(f"attention_mask must be {list(ids.shape)}, got {list(mask.shape)}.")
        if len(release.contexts) not in (1, len(ids)):
            raise ConfigError(f"Got {len(ids)} texts for {len(release.contexts)} prefixes.")
        offsets = {len(c.public_rows) + c.rows for c in release.contexts}
        if len(offsets) != 1:
            raise ReleaseError(
                "Prefixes of different padded lengths cannot be batched: release them with the same public head and prefix_bucket."
            )
        offset = offsets.pop()
        check_window(self.limit, offset + ids.shape[1])
        tags = self.guard.bind(release.contexts)
        cache = PrefixCache(tags * (len(ids) if len(tags) == 1 else 1), offset, len(self.layers))
        self.serve(cache)
        full = torch.cat([mask.new_ones(len(ids), offset), mask], dim=1)
        return {**public, "input_ids": ids, "attention_mask": full, "past_key_values": cache}

    def words(self, setting: Setting) -> HostWords:
        return prefix_words(self.model, setting)

    def chat(
        self, release: Callable[..., Any], tokenizer: Any, messages: Any, public_system: bool, **options: Any
    ) -> str:
        parts = split_chat(tokenizer, messages, public_system=public_system)
        apart = self.guard.config.unit == "group"
        text: Any = private_message(messages)[1]
        if apart and len(records_of(text)) != len(parts.segments):  # a template changed its lines
            text = None
        released = release(
            parts.segments if apart else parts.private,
            groups="segments" if apart else None,
            public_head=parts.head,
            prefix_bucket=options.pop("prefix_bucket", None),
            text=text,
        )
        question = parts.input_ids.to(device_of(self.model))
        reply = self.model.generate(**released.inputs(input_ids=question), **options)[0, question.shape[1] :]
        return str(tokenizer.decode(reply, skip_special_tokens=True))
