"""`ProtectedSeq2Seq`: the handle of a protected encoder-decoder model."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ....errors import ConfigError, ProtectionLostError, ReleaseError
from ....mechanisms.groups import as_groups
from ....privacy.bits import Entropy
from ...access import TextGate
from ...accounts import PROTECT_AGAIN
from ...bindings import bind, unique
from ...content_names import special_ids, with_texts
from ...context import PrivateContext
from ...fingerprint import Fingerprint, Sketched, stamp
from ...host_words import HostWords, Setting, document_words
from ...locks import locked
from ...making import Recipe
from ...placeholder import Tag, make_placeholder, new_tag, read_tags, rewritten
from ...recorded_runs import refuse_recording
from ...release import Release
from ...released import Binding, ReleasedContext
from ...tables import LayerTable
from ...weight_changes import refuse_call_adapters
from ..routed import RoutedHandle
from ..routing import Routing
from .cross_attention import LAYER_ATTRIBUTE, NAME, Call, Calls, LayerState, dp_xattn
from .cross_layers import rowwise_reason
from .cross_probing import context_channels, find_layers
from .document_contexts import MASK, STATES, TYPES, gather, join_documents, name_inputs
from .document_encoder import EncoderSide
from .document_generation import GenerateShadow, as_inputs, check_mask, read_placeholder
from .encoder_outputs import last_hidden_state

# the marker's row and one of NaN: layers project a placeholder's rows at the first token, which must not take longer for a long context
PLACEHOLDER_ROWS = 2
CLOSED = (
    "The encoder belongs to a protected model and may not run on its own: its output would enter the decoder past a release. Use "
    "model.generate(...), or release = protected.release(...) and model(**release.inputs(), ...); if this document is public, use "
    "`with protected.public():`."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """Tables, and what they were built of."""

    key: tuple[torch.device, torch.dtype]
    current: Fingerprint
    bindings: list[Binding]
    tables: dict[str, LayerTable]


PUBLIC_CALL = Call({}, torch.zeros(0, dtype=torch.int64), public=True)


class ProtectedSeq2Seq(RoutedHandle):
    """A protected encoder-decoder model. Made by `dpx.protect`; a context manager that unprotects.

    While it is active, what `generate` is given for the encoder is private: each document is released once (charged to the ledger before
    it is encoded), and the decoder receives a placeholder in place of the encoder's output. Every beam, sample and step reads the release.

    *Formal guarantee.* Everything that leaves the model about a private context is post-processing of its `Release`, see `report()`.
    """

    routing = Routing(NAME, LAYER_ATTRIBUTE, dp_xattn)
    closed = CLOSED  # what the encoder's gate says

    def __init__(self, model: Any, *settings: Any, **options: Any) -> None:
        self._sketched = Sketched()
        self._built: Built | None = None
        super().__init__(model, *settings, **options)
        self._encoder = EncoderSide(model)
        self._calls = Calls()
        self._generate = GenerateShadow(model, self)

    def _find_layers(self) -> dict[str, Any]:
        self.cross = find_layers(self.model)
        return dict(self.cross)

    def _layer_state(self, name: str) -> LayerState:
        layer = self.cross[name]
        return LayerState(name, self._calls, self._configs[name], self.access, layer.padding)

    def _close(self) -> None:
        self._gates = [TextGate(self._encoder.module, self.access, self.closed)]

    def _opened(self) -> str | None:
        closed = all(g.installed() and g.encoder is self._encoder.module for g in self._gates)
        return None if closed else "the encoder or its gate was replaced"

    @property
    def channels(self) -> int:
        return context_channels(self.model)

    @property
    def hidden_length(self) -> int:
        return PLACEHOLDER_ROWS

    # ---- gates -------------------------------------------------------------------------------------------------------------

    def check_thoroughly(self) -> None:
        """`check`, and that no layer mixes rows since. Before each release and call of `generate`."""
        self.check()
        for name, layer in self.cross.items():
            reason = rowwise_reason(layer.module)
            if reason is not None:
                raise ProtectionLostError(
                    f"The model was changed after it was protected ({name}): {reason}. Call dpx.unprotect(model), undo the change, "
                    f"{PROTECT_AGAIN}."
                )
        self.watch.look(self.watched)

    @property
    def watched(self) -> list[torch.nn.Module]:
        """The layers, and what makes their context from the encoder's output."""
        return [m for c in self.cross.values() for m in (c.module, c.bridge) if m is not None]

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's gate. Raises before anything runs."""
        refuse_recording()
        if torch.compiler.is_compiling():
            raise ProtectionLostError(
                "The gate of a protected encoder-decoder model is never traced: torch.compile runs it with fullgraph=False only."
            )
        self._calls.current = None
        self.check()
        self._calls.count()
        self.refuse_checkpointing(module)
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        states = last_hidden_state(bound.get(STATES, bound.get("kwargs", {}).get(STATES)))
        self._check_batch(bound, states)
        before = self._calls.seen
        call = self._read_call(states)
        if call is not None and states is not None and (before is None or before[3] is not call):
            check_mask(bound.get(MASK), states)  # once for each tensor: it waits for the device
        if call is None and not self.access.public:
            raise ProtectionLostError(
                "This model is protected and was called without the placeholder of a release. Call model.generate(...) or pass "
                "release.inputs(), or declare the document public with `with protected.public():`."
            )
        self._calls.current = PUBLIC_CALL if call is None else call

    def refuse_others(self, given: dict[str, Any]) -> None:
        """See `EncoderSide.refuse_others`."""
        self._encoder.refuse_others(given)

    def _check_batch(self, bound: dict[str, Any], states: torch.Tensor | None) -> None:
        """Before a release that is due is charged: raises ConfigError where the decoder's batch is another one."""
        ids = bound.get("decoder_input_ids", bound.get("decoder_inputs_embeds"))
        if states is None or not isinstance(ids, torch.Tensor) or len(ids) == len(states):
            return
        if self.promises.due(unique(read_tags(states))):
            raise ConfigError(
                f"Got {len(ids)} decoder inputs for {len(states)} private contexts. Nothing was spent."
            )

    def _read_call(self, states: torch.Tensor | None) -> Call | None:
        """What these states name; None where they are no placeholder.

        Raises:
            ReleaseError: see `_build`; or only a part of the batch is a placeholder.
        """
        if states is None:
            return None
        seen = self._calls.seen
        known = seen is not None and seen[0]() is states and seen[1] == self._state_of(states)
        if seen is not None and known and not bool(rewritten(states, seen[2])):
            refuse_call_adapters([self.model])
            return seen[3]  # the same tensor at every step: parsed already
        found = read_tags(states)
        tags = unique(found)
        if not tags:
            return None
        refuse_call_adapters([self.model])
        if None in found:
            raise ReleaseError(
                "Private and public contexts cannot stand in one batch; call the model once for each."
            )
        index = torch.tensor([tags.index(tag) for tag in found if tag is not None], device=states.device)
        self.promises.keep(tags)
        contexts = tuple(b.context for b in self._bindings.find(tags))
        call = Call(self._build(tags, states.device), index, contexts=contexts)
        if states.is_inference():
            self._calls.seen = None
        else:
            self._calls.seen = weakref.ref(states), self._state_of(states), states.detach().clone(), call
        return call

    def _state_of(self, states: torch.Tensor) -> object:
        return states._version, self.watch.changes, stamp(self.watched)

    @locked
    @torch.inference_mode(False)  # what is kept must serve other modes too
    @torch.no_grad()
    def _build(self, tags: Sequence[Tag], device: torch.device) -> dict[str, LayerTable]:
        """The layers' tables for these bindings; those that were built last, as long as nothing they are made of has changed.

        Raises:
            ReleaseError: unknown placeholder, releases that cannot stand in one batch, or ones that the weights do not fit.
        """
        bindings = self._bindings.find(tags)
        current = self.verify([b.context for b in bindings])
        key = (device, self.model.dtype)
        built = self._built
        if built is None or built.key != key or built.current is not current or built.bindings != bindings:
            tables = self._tables.build(bindings, device, self.model.dtype, current)
            self._built = built = Built(key, current, bindings, tables)
        return built.tables

    @locked
    def _current_fingerprint(self) -> Fingerprint:
        take = super()._current_fingerprint
        return self._sketched.current(self.model.dtype, self.watched, self.watch.changes, take)

    def _restore(self) -> None:
        super()._restore()
        self._built = None

    # ---- releases ----------------------------------------------------------------------------------------------------------

    @locked
    def release(
        self,
        context: Any = None,
        *,
        groups: torch.Tensor | Literal["documents"] | str | None = None,
        fresh: bool = False,
        horizon: int | None = None,
        text: str | Sequence[str] | None = None,
        **encoder_inputs: Any,
    ) -> Release:
        """Releases private contexts, one budget each. A context that this handle released before is reused and not charged again.

        Args:
            context: token ids [n] or [B, n], or rows of the encoder's output [n, C] or [B, n, C]. Or, by name or in one mapping, what the
                encoder takes: input_ids, inputs_embeds, input_features, input_values, pixel_values with attention_mask, or
                encoder_outputs. What the mask hides is no row.
            groups: for `unit="group"`, public: integers [n] that name each row's group; or "documents": the batch is ONE context of
                documents, each encoded apart from all others, and each a group.
            fresh: release again with new noise; charged again.
            horizon: ONE context that grows, by at most so many appends, this one included: `Release.append`. Each is charged when it
                comes.
            text: what the contexts are tokens of, where there is such a text: charged as well, so that it has one budget on all hosts. One
                for each context; with "documents", one for each document, or the whole with a document on each line.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no context of the batch.
        """
        if encoder_inputs and context is not None:
            raise ConfigError("Pass the context either by itself or by name, not both.")
        given: Any = encoder_inputs or context
        contexts, own = self._named(given, as_groups(groups))
        contexts = with_texts(contexts, text, self._batch(given) if isinstance(groups, str) else None)
        if horizon is not None:
            return self._open(contexts, own, horizon)
        return Release(self.releases.make(contexts, groups=own, fresh=fresh), self.config, self)

    @staticmethod
    def _batch(given: Any) -> int:
        """How many documents a batch holds, of one that `_named` took."""
        inputs = gather(given)
        name, main = next((k, v) for k, v in inputs.items() if k not in (MASK, TYPES))
        return 1 if main.ndim == {"input_ids": 1}.get(name, 2) else len(main)

    def _named(self, context: Any, groups: Any) -> tuple[list[PrivateContext], torch.Tensor | None]:
        """Contexts, and the groups that are not documents."""
        inputs = gather(context)
        self._encoder.check(inputs)
        encoder = () if STATES in inputs else (self._encoder.module,)
        side = self._encoder
        named = name_inputs(inputs, self.channels, side.encode, side.trial, special_ids(self.model))
        contexts = [dataclasses.replace(context, encoder=encoder) for context in named]
        if not isinstance(groups, str):
            return contexts, groups
        if groups != "documents":
            raise ConfigError('`groups` must be integers [n] or "documents".')
        return [join_documents(contexts, self.config.unit)], None

    def _open(self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, horizon: int) -> Release:
        if not all(context.rows for context in contexts):
            raise ConfigError("A context that grows is made of token ids, embeddings, or hidden states.")
        return super()._open(contexts, groups, horizon)

    def run(
        self,
        prepared: Recipe,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: Fingerprint,
        entropy: Entropy | None,
    ) -> ReleasedContext:
        loaded = context.load()
        rows = context.rows or len(loaded[0])
        known = dataclasses.replace(context, rows=rows, load=lambda: loaded)
        return super().run(prepared, known, groups, state, entropy)

    # ---- placeholders ------------------------------------------------------------------------------------------------------

    @locked
    @torch.no_grad()
    def inputs(
        self, release: Release, prompt: str | Sequence[str] | None = None, **public: Any
    ) -> dict[str, Any]:
        """See `Release.inputs`. input_ids, attention_mask: PUBLIC documents, encoded by themselves, whose exact rows join the release under
        one softmax: one for all contexts or one for each. Anything else is passed on. ONE context serves a batch of decoder_input_ids.
        """
        self.check_thoroughly()
        if prompt is not None:
            raise ConfigError("A model has no tokenizer: pass public text as input_ids (and attention_mask).")
        ids, mask, types = (public.pop(n, None) for n in ("input_ids", MASK, TYPES))
        if types is not None and ids is None:
            raise ConfigError(f"`{TYPES}` are of public input_ids; the release is read as it is.")
        self.refuse_others(public)
        asked = public.get("decoder_input_ids")
        batch = len(asked) if isinstance(asked, torch.Tensor) and asked.ndim == 2 else 1
        contexts = release.contexts * (batch if len(release.contexts) == 1 else 1)
        count = len(contexts)
        rows = [None] * count if ids is None else self._public_rows(ids, mask, types, count)
        tags: list[Tag] = []
        for context, exact in zip(contexts, rows, strict=True):
            tag = context.tag if exact is None else new_tag()
            tags.append(self._bindings.add(bind(context, exact, tag)))
        self._calls.seen = None
        self._build(unique(tags), self.model.device)
        placeholder = make_placeholder(
            tags, PLACEHOLDER_ROWS, self.channels, self.model.dtype, self.model.device
        )
        return {**public, **as_inputs(placeholder, self._takes_mask)}

    @property
    def calls(self) -> Calls:
        """The forward that each thread is in."""
        return self._calls

    @property
    def _takes_mask(self) -> bool:
        text = self.model.main_input_name == "input_ids"
        return text and MASK in inspect.signature(self.model.forward).parameters

    def _public_rows(
        self, ids: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None, count: int
    ) -> list[torch.Tensor]:
        documents, _ = self._named({"input_ids": ids, MASK: mask, TYPES: types}, None)
        rows = [d.load()[0] for d in documents]
        if len(rows) not in (1, count):
            raise ConfigError(f"Got {len(rows)} public documents for {count} contexts.")
        return rows * (count if len(rows) == 1 else 1)

    def _promised(self, contexts: Sequence[PrivateContext]) -> torch.Tensor:
        """The placeholder of releases that exist, or that the model's gate makes when everything public has passed."""
        tags = self.promises.make(contexts)
        return make_placeholder(tags, PLACEHOLDER_ROWS, self.channels, self.model.dtype, self.model.device)

    def serve(self, given: dict[str, Any], copies: int = 1) -> dict[str, Any]:
        """What `generate` passes on in place of its encoder inputs: those of a release that is named, or made of a private context.

        copies: how often each batch element is repeated.
        """
        placeholder = read_placeholder(given)
        if placeholder is None:
            placeholder = self._promised(self._named(given, None)[0])
        self._calls.seen = None
        return as_inputs(placeholder.repeat_interleave(copies, dim=0), self._takes_mask)

    # ---- report ------------------------------------------------------------------------------------------------------------

    def words(self) -> HostWords:
        """What is public and what is not covered here."""
        words = document_words(self.model, Setting.of(self.config, self.calibration))
        if not getattr(self.model.generation_config, "encoder_no_repeat_ngram_size", None):
            return words
        off = "encoder_no_repeat_ngram_size is switched off: it would read the document past the release."
        return dataclasses.replace(words, warnings=(off,))
