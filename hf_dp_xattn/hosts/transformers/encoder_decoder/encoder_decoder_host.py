"""`EncoderDecoderHost`: an encoder-decoder model, whose private context is a document."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ....errors import ConfigError, ContextError, ProtectionLostError, ReleaseError
from ...accounts import PROTECT_AGAIN
from ...bindings import bind, unique
from ...content_names import name_of_text, special_ids, units_of_text, with_texts
from ...context import Part, PrivateContext
from ...corpus import Document
from ...fingerprint import Fingerprint, fingerprint
from ...guard import Guard
from ...host import Named, Readable
from ...host_words import HostWords, Setting, document_words
from ...layer import Layer
from ...model_gates import TextGate
from ...placeholder import Tag, new_tag, read_tags, rewritten
from ...weight_changes import refuse_call_adapters
from ..generating import check_public_ids
from ..reading import LayerState
from ..routed_host import RoutedHost
from ..routing import Routing
from .cross_attention import LAYER_ATTRIBUTE, NAME, Call, Calls, dp_xattn
from .cross_layers import CrossLayer, rowwise_reason
from .cross_probing import context_channels, find_layers
from .document_contexts import MASK, STATES, TYPES, gather, join_documents, name_inputs, units_of_document
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


PUBLIC_CALL = Call({}, torch.zeros(0, dtype=torch.int64), public=True)


class EncoderDecoderHost(RoutedHost):
    """An encoder-decoder model of transformers.

    What `generate` is given for the encoder is private: each document is released once (charged to the ledger before it is encoded), and
    the decoder receives a placeholder in place of the encoder's output. Every beam, sample and step reads the release.

    probe: finds the cross-attention layers; raises UnsupportedModelError. encoder_side: what encodes a context. generate_shadow: what
    stands in for `generate`. closed: what the encoder's gate says.
    """

    probe: Callable[[Any], dict[str, CrossLayer]] = staticmethod(find_layers)
    encoder_side: ClassVar[type[EncoderSide]] = EncoderSide
    generate_shadow: ClassVar[type[GenerateShadow]] = GenerateShadow
    routing = Routing(NAME, LAYER_ATTRIBUTE, dp_xattn)
    never_traced = "The gate of a protected encoder-decoder model is never traced: torch.compile runs it with fullgraph=False only."
    closed = CLOSED
    calls: Calls

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.calls = Calls()
        self.encoder = self.encoder_side(model)
        self.generate = self.generate_shadow(self)

    def find_layers(self) -> dict[str, Layer]:
        self.cross = self.probe(self.model)
        return dict(self.cross)

    def sketch(self) -> Fingerprint:
        return fingerprint(self.cross.values(), self.model.dtype)

    def watched(self) -> list[torch.nn.Module]:
        """The layers, and what makes their context from the encoder's output."""
        return [part for layer in self.layers.values() for part in layer.parts()]

    @property
    def channels(self) -> int:
        return context_channels(self.model)

    @property
    def hidden_length(self) -> int:
        return PLACEHOLDER_ROWS

    def layer_state(self, name: str) -> LayerState:
        padding = self.cross[name].padding
        return LayerState(name, self.calls, self.originals[name], self.guard.access, padding)

    def install(self, guard: Guard, handle: Any) -> None:
        super().install(guard, handle)
        self._gates = [TextGate(self.encoder.module, guard.access, self.closed)]

    def lost(self) -> str | None:
        same = all(gate.encoder is self.encoder.module for gate in self._gates)
        closed = same and TextGate.installed(self._gates)
        return super().lost() or (None if closed else "the encoder or its gate was replaced")

    def changed(self) -> str | None:
        for name, layer in self.layers.items():
            reason = rowwise_reason(layer.module)
            if reason is not None:
                return (
                    f"The model was changed after it was protected ({name}): {reason}. Call dpx.unprotect(model), "
                    f"undo the change, {PROTECT_AGAIN}."
                )
        return None

    # ---- a forward ---------------------------------------------------------------------------------------------------------

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = self.begin(module, args, kwargs)
        states = last_hidden_state(inputs.get(STATES))
        self._check_batch(inputs, states)
        before = self.calls.seen
        call = self.read_call(states)
        if call is not None and states is not None and (before is None or before[3] is not call):
            check_mask(inputs.get(MASK), states)  # once for each tensor: it waits for the device
        if call is None and not self.guard.access.public:
            raise ProtectionLostError(
                "This model is protected and was called without the placeholder of a release. Call model.generate(...) or pass "
                "release.inputs(), or declare the document public with `with protected.public():`."
            )
        self.calls.current = PUBLIC_CALL if call is None else call

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs = super().begin(module, args, kwargs)
        self.calls.count()
        return inputs

    def refuse_others(self, inputs: dict[str, Any]) -> None:
        """See `EncoderSide.refuse_others`."""
        self.encoder.refuse_others(inputs)

    def _check_batch(self, bound: dict[str, Any], states: torch.Tensor | None) -> None:
        """Before a release that is due is charged: raises ConfigError where the decoder's batch is another one."""
        ids = bound.get("decoder_input_ids", bound.get("decoder_inputs_embeds"))
        if states is None or not isinstance(ids, torch.Tensor) or len(ids) == len(states):
            return
        if self.guard.promises.due(unique(read_tags(states))):
            raise ConfigError(
                f"Got {len(ids)} decoder inputs for {len(states)} private contexts. Nothing was spent."
            )

    def read_call(self, states: torch.Tensor | None) -> Call | None:
        """What these states name; None where they are no placeholder.

        Raises:
            ReleaseError: see `Guard.build`; or only a part of the batch is a placeholder.
        """
        if states is None:
            return None
        seen = self.calls.seen
        known = seen is not None and seen[0]() is states and seen[1] == self._state_of(states)
        if seen is not None and known and not bool(rewritten(states, seen[2])):
            refuse_call_adapters([self.model])
            return seen[3]  # the same tensor at every step: parsed already
        batch_tags = read_tags(states)
        tags = unique(batch_tags)
        if not tags:
            return None
        refuse_call_adapters([self.model])
        if None in batch_tags:
            raise ReleaseError(
                "Private and public contexts cannot stand in one batch; call the model once for each."
            )
        index = torch.tensor([tags.index(tag) for tag in batch_tags if tag is not None], device=states.device)
        self.guard.promises.keep(tags)
        contexts = tuple(b.context for b in self.guard.bindings.find(tags))
        call = Call(self.guard.build(tags, states.device), index, contexts=contexts)
        if states.is_inference():
            self.calls.seen = None
        else:
            self.calls.seen = weakref.ref(states), self._state_of(states), states.detach().clone(), call
        return call

    def _state_of(self, states: torch.Tensor) -> object:
        return states._version, self.weights.state()

    # ---- private contexts --------------------------------------------------------------------------------------------------

    def name(
        self, context: Any, groups: Any, *, text: str | Sequence[str] | None = None, **encoder_inputs: Any
    ) -> Named:
        inputs = one_of(context, encoder_inputs)
        contexts, row_groups = self.named(inputs, groups)
        units = _batch(inputs) if isinstance(groups, str) else None
        return Named(with_texts(contexts, text, units), row_groups)

    def named(self, context: Any, groups: Any) -> Named:
        """Contexts, and the groups that are not documents."""
        inputs = gather(context)
        self.encoder.check(inputs)
        encoder = () if STATES in inputs else (self.encoder.module,)
        side = self.encoder
        named = name_inputs(inputs, self.channels, side.encode, side.trial, special_ids(self.model))
        contexts = [dataclasses.replace(context, encoder=encoder) for context in named]
        if not isinstance(groups, str):
            return Named(contexts, groups)
        if groups != "documents":
            raise ConfigError('`groups` must be integers [n] or "documents".')
        return Named([join_documents(contexts, self.guard.config.unit)], None)

    def document(self, document: Any) -> Document:
        """A row of a dataset with input_ids (and attention_mask), or token ids [n]; a column `text` is what they are of, and charged."""
        columns = dict(document) if isinstance(document, Mapping) else {"input_ids": document}
        kept = {
            k: torch.as_tensor(columns[k]) for k in ("input_ids", MASK, TYPES) if columns.get(k) is not None
        }
        if "input_ids" not in kept or kept["input_ids"].ndim != 1 or kept["input_ids"].is_floating_point():
            raise ContextError(
                "A document of a corpus is a row with input_ids [n], as dataset.map(tokenizer, ...) gives. Nothing was spent."
            )
        (context,) = self.named(kept, None).contexts
        text = columns.get("text")
        named = [Part(name_of_text(text), units_of_text([text]))] if isinstance(text, str) else []
        return Document(context, (*units_of_document(context), *named))

    def check_growing(self, contexts: Sequence[PrivateContext]) -> None:
        if not all(context.rows for context in contexts):
            raise ConfigError("A context that grows is made of token ids, embeddings, or hidden states.")

    # ---- what is read ------------------------------------------------------------------------------------------------------

    def inputs(
        self, release: Readable, prompt: str | Sequence[str] | None = None, **public: Any
    ) -> dict[str, Any]:
        """See `Release.inputs`. input_ids, attention_mask: PUBLIC documents, encoded by themselves, whose exact rows join the release under
        one softmax: one for all contexts or one for each. Anything else is passed on. ONE context serves a batch of decoder_input_ids.
        """
        if prompt is not None:
            raise ConfigError("A model has no tokenizer: pass public text as input_ids (and attention_mask).")
        ids, mask, types = (public.pop(n, None) for n in ("input_ids", MASK, TYPES))
        if types is not None and ids is None:
            raise ConfigError(f"`{TYPES}` are of public input_ids; the release is read as it is.")
        self.refuse_others(public)
        asked = public.get("decoder_input_ids")
        check_public_ids("decoder_input_ids", asked, self.model.get_decoder())
        batch = len(asked) if isinstance(asked, torch.Tensor) and asked.ndim == 2 else 1
        contexts = release.contexts * (batch if len(release.contexts) == 1 else 1)
        count = len(contexts)
        rows = [None] * count if ids is None else self._public_rows(ids, mask, types, count)
        tags = self.guard.bindings.add(
            bind(context, exact, context.tag if exact is None else new_tag())
            for context, exact in zip(contexts, rows, strict=True)
        )
        return {**public, **as_inputs(self.ready(tags), self._takes_mask)}

    def ready(self, tags: Sequence[Tag]) -> torch.Tensor:
        """The placeholder of releases that exist, their tables at hand."""
        self.calls.seen = None
        self.guard.build(tags, self.model.device)
        return self.guard.placeholder(tags, PLACEHOLDER_ROWS, self.model.device)

    @property
    def _takes_mask(self) -> bool:
        text = self.model.main_input_name == "input_ids"
        return text and MASK in inspect.signature(self.model.forward).parameters

    def _public_rows(
        self, ids: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None, count: int
    ) -> list[torch.Tensor]:
        documents, _ = self.named({"input_ids": ids, MASK: mask, TYPES: types}, None)
        rows = [d.load()[0] for d in documents]
        if len(rows) not in (1, count):
            raise ConfigError(f"Got {len(rows)} public documents for {count} contexts.")
        return rows * (count if len(rows) == 1 else 1)

    def promised(self, contexts: Sequence[PrivateContext]) -> torch.Tensor:
        """The placeholder of releases that exist, or that the model's gate makes when everything public has passed."""
        tags = self.guard.promises.make(contexts)
        return self.guard.placeholder(tags, PLACEHOLDER_ROWS, self.model.device)

    def serve(self, inputs: dict[str, Any], copies: int = 1) -> dict[str, Any]:
        """What `generate` passes on in place of its encoder inputs: those of a release that is named, or made of a private context.

        copies: how often each batch element is repeated.
        """
        placeholder = read_placeholder(inputs)
        if placeholder is None:
            placeholder = self.promised(self.named(inputs, None).contexts)
        self.calls.seen = None
        return as_inputs(placeholder.repeat_interleave(copies, dim=0), self._takes_mask)

    def words(self, setting: Setting) -> HostWords:
        words = document_words(self.model, setting)
        if not getattr(self.model.generation_config, "encoder_no_repeat_ngram_size", None):
            return words
        off = "encoder_no_repeat_ngram_size is switched off: it would read the document past the release."
        return dataclasses.replace(words, warnings=(off,))


def one_of(context: Any, named: dict[str, Any]) -> Any:
    """A context that is given by itself, or by name. Raises ConfigError for both."""
    if named and context is not None:
        raise ConfigError("Pass the context either by itself or by name, not both.")
    return named or context


def _batch(context: Any) -> int:
    """How many documents a batch holds, of one that `named` took."""
    inputs = gather(context)
    name, main = next((k, v) for k, v in inputs.items() if k not in (MASK, TYPES))
    return 1 if main.ndim == {"input_ids": 1}.get(name, 2) else len(main)
