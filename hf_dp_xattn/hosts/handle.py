"""`ProtectedPipeline`: the handle of a protected host. It owns the processors, gates, releases and placeholders."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, DPXAttnError, ProtectionLostError, ReleaseError
from ..mechanisms.groups import as_groups
from ..privacy.ledger import Budget, Ledger
from ..report import PrivacyReport
from .access import NO_COPY, Access, TextGate
from .accounts import PROTECT_AGAIN
from .bindings import Bindings, bind, unique
from .context import PrivateContext
from .diffusers.architectures import changed_reason, find_layers, unwrap
from .diffusers.by_hand import EncodesByHand
from .diffusers.copies import CopyGuard
from .diffusers.harmless import HarmlessCalls
from .diffusers.phrases import RULE
from .diffusers.pipelines import PipelinePatch
from .diffusers.processor import DPAttnProcessor
from .diffusers.prompt_contexts import name_contexts, name_phrases
from .diffusers.text_side import TextSide
from .diffusers.unet_forward import ForwardGate
from .fingerprint import Fingerprint, fingerprint
from .growing import GrowingContext, append_to, only, open_growing
from .host_words import HostWords, Setting, prompt_words
from .lengths import HIDDEN
from .locks import Lock, locked
from .making import Recipe, choose_maker
from .placeholder import Tag, make_placeholder, new_tag
from .promised import Promises
from .rehearsal import rehearse
from .release import Release
from .released import ReleasedContext, require_fit
from .released_cache import ReleasedCache
from .releases import Releases
from .saving import SaveShadow
from .storage import ReleaseFile
from .tables import LayerTable, Tables
from .weight_changes import WeightWatch

if TYPE_CHECKING:
    from ..calibration.calibration import AnyCalibration
    from ..privacy.bits import Entropy
    from .text.text_release_file import TextReleaseFile

HANDLE_ATTRIBUTE = "_dp_xattn_handle"


class ProtectedPipeline(EncodesByHand):
    """A protected UNet and the pipelines that share it. Made by `dpx.protect`; a context manager that unprotects.

    While it is active, a text prompt or embeddings given to a protected pipeline are private: each context is released once (charged to the
    ledger before it is encoded), and the UNet receives a placeholder in its stead.

    *Threads and tasks.* What a forward reads is bound to its thread, a permission (`public`) to its context. Calls of the pipelines wait
    for each other, which diffusers needs (they share a scheduler); so do releases, which need not wait for a call to end.

    *Formal guarantee.* Everything that leaves the host about a private context is post-processing of its `Release`, see `report()`.
    """

    projects_rows = True  # keys and values are made of rows of context space by the layers' present weights

    def __init__(
        self,
        unet: Any,  # a UNet2DConditionModel; mypy does not see through its mixins
        config: DPXAttnConfig,
        *,
        calibration: AnyCalibration | None = None,
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        entropy: Entropy | None = None,
        serving_only: bool = False,
    ) -> None:
        self.unet = unet
        self.config = config
        self.calibration = calibration
        self.lock = Lock()  # held while anything of this handle is changed, never while a host runs
        self.releases: Releases[Fingerprint, Recipe, ReleasedContext] = Releases(
            config,
            self,
            ReleasedCache(),
            self.lock,
            ledger=ledger,
            budget=budget,
            entropy=entropy,
            serving_only=serving_only,
        )
        self.layers = self._find_layers()
        self.access = Access()
        self._patches: list[PipelinePatch] = []
        self._gates: list[TextGate] = []
        self._originals: dict[str, Any] = {}
        self._processors: dict[str, DPAttnProcessor] = {}
        self._bindings = Bindings()
        self.promises = Promises(self.releases, self._bindings)
        self.watch = WeightWatch()
        self.calling = Lock()  # held while a pipeline runs; taken before `lock`
        self._active: tuple[tuple[Tag, ...], torch.device] = (), torch.device("cpu")
        self.watch.look(self.watched)  # the first look is no change
        self._fingerprint = self._current_fingerprint()  # of the weights that the tables were built for
        self._tables = Tables(self.layers)
        self._serving: dict[str, LayerTable] = {}
        self._maker = choose_maker(
            unet, self.layers, config, calibration, self._fingerprint, serving_only=serving_only
        )
        self.gate = ForwardGate(unet, self)
        self._guards: tuple[Any, ...] = ()
        self.saving = SaveShadow(unet, self)
        self.active = False

    def _find_layers(self) -> dict[str, Any]:
        return dict(find_layers(self.unet))

    @property
    def ledger(self) -> Ledger:
        """What was spent, and on which context."""
        return self.releases.ledger

    @property
    def budget(self) -> Budget:
        """Of a context."""
        return self.releases.budget

    @property
    def entropy(self) -> Entropy | None:
        """The source of the noise; None: the operating system's."""
        return self.releases.entropy

    # ---- installing and removing -------------------------------------------------------------------------------------------

    @locked
    def install(self) -> None:
        """Registers the processors and the UNet's gate; undone by `unprotect`."""
        for message in self._maker.warnings(self._fingerprint):
            warnings.warn(message, stacklevel=5)
        self.active = True
        self._originals = {name: attn.processor for name, attn in self.layers.items()}
        forwards, access = self.gate.forwards, self.access
        self._processors = {name: DPAttnProcessor(name, forwards, access) for name in self.layers}
        setattr(self.unet, HANDLE_ATTRIBUTE, self)
        current = self.unet.attn_processors
        self.unet.set_attn_processor(
            {**current, **{f"{n}.processor": p for n, p in self._processors.items()}}
        )
        self.gate.install()
        harmless = HarmlessCalls(self.unet, {self.layers[n]: p for n, p in self._processors.items()})
        harmless.install()
        self._guards = (harmless, CopyGuard(self.layers))
        self.saving.install()
        self._set_tables(*self._active, self._fingerprint)
        self.activate(*self._active)

    def has(self, pipe: Any) -> bool:
        return any(patch.pipe is pipe for patch in self._patches)

    def text_side(self, pipe: Any) -> TextSide:
        """The text side of a pipeline that may join. Raises ConfigError where the calibration is for another text encoder."""
        text = TextSide(pipe)
        self._maker.check_text(text)
        return text

    @locked
    def join(self, pipe: Any, text: TextSide) -> None:
        """Adds a pipeline that shares the UNet."""
        if text.available and all(g.encoder is not unwrap(text.encoder) for g in self._gates):
            encoder = unwrap(text.encoder)
            # the parts too: some libraries call them one by one
            self._gates += [TextGate(part, self.access) for part in (encoder, *encoder.children())]
        patch = PipelinePatch(pipe, self, self.gate, text)
        self._patches.append(patch)
        patch.install()
        vars(pipe)[HANDLE_ATTRIBUTE] = self  # to be found, whatever becomes of its UNet

    def unprotect(self) -> None:
        """Restores the host: the original processor objects, no hooks, no attributes. Releases stay valid on disk."""
        with self.calling, self.lock:
            if self.active:
                self._restore()

    def _restore(self) -> None:
        self.active = False
        for name, attn in self.layers.items():
            if isinstance(attn.processor, DPAttnProcessor):  # else the caller chose another one since
                attn.set_processor(self._originals[name])
        parts: tuple[Any, ...] = (self.gate, *self._gates, *self._patches, *self._guards, self.saving)
        for installed in parts:
            installed.remove()
        for host in (self.unet, *(patch.pipe for patch in self._patches)):
            if vars(host).get(HANDLE_ATTRIBUTE) is self:
                del vars(host)[HANDLE_ATTRIBUTE]
        for processor in self._processors.values():
            processor.clear()
        self._tables.clear()
        self.promises.clear()
        self.releases.clear()
        self._serving = {}

    def __enter__(self) -> ProtectedPipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unprotect()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)

    def __repr__(self) -> str:
        c = self.config
        state = "active" if self.active else "unprotected"
        return (
            f"ProtectedPipeline({state}, layers={len(self.layers)}, mechanism={c.mechanism!r}, epsilon={c.epsilon:g}, "
            f"delta={c.delta:g}, unit={c.unit!r}, releases={len(self.releases.spent)})"
        )

    # ---- gates -------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        lost: str | None = None
        if not self.active:
            lost = "it was unprotected"
        elif not self.gate.installed() or self.unet.__dict__.get(HANDLE_ATTRIBUTE) is not self:
            lost = "the gate of the UNet was removed"
        elif self.unet.encoder_hid_proj is not None:
            lost = "an IP-Adapter (encoder_hid_proj) was loaded"
        else:
            replaced = [
                name
                for name, attn in self.layers.items()
                if attn.processor is not self._processors[name] or self.unet.get_submodule(name) is not attn
            ]
            if replaced:
                now = type(self.layers[replaced[0]].processor).__name__
                lost = f"{len(replaced)} of {len(self.layers)} attention processors were replaced ({replaced[0]} now has {now})"
        if lost is None and not all(gate.installed() for gate in self._gates):
            lost = "the gate of the text encoder was removed"
        if lost is not None:
            raise ProtectionLostError(
                f"The protection is no longer in place: {lost}. Nothing was run. Undo that change (unload the adapter, disable slicing "
                f"or xformers), call dpx.unprotect(pipe), and {PROTECT_AGAIN}."
            )

    def check_thoroughly(self) -> None:
        """`check`, and that the model has gained no layer or way around cross-attention since. Before each release and call."""
        self.check()
        reason = changed_reason(self.unet, self.layers)
        if reason is not None:
            raise ProtectionLostError(
                f"The UNet was changed after it was protected: {reason}. Call dpx.unprotect(pipe), undo the change, {PROTECT_AGAIN}."
            )
        self.watch.look(self.watched)

    @property
    def watched(self) -> list[torch.nn.Module]:
        """The modules whose weights a release must fit."""
        return [m for layer in self.layers.values() for m in (layer.to_k, layer.to_v)]

    @contextmanager
    def public(self) -> Iterator[None]:
        """Inside, text is declared PUBLIC: nothing is released or charged, prompts go to the host as they are.

        For baselines and for other uses of a shared text encoder. Holds for the running context (a thread, a task of asyncio, and what
        is copied from it meanwhile) until the block is left; in a generator, while the generator itself runs.
        """
        with self.access.enter("public"):
            yield

    # ---- releases ----------------------------------------------------------------------------------------------------------

    @locked
    def release(
        self,
        context: str | Sequence[str] | torch.Tensor,
        *,
        groups: torch.Tensor | Literal["phrases"] | None = None,
        fresh: bool = False,
        horizon: int | None = None,
    ) -> Release:
        """Releases private contexts, one budget each. A context that this handle released before is reused and not charged again.

        Args:
            context: a string, a list of strings, token ids [n] or [B, n], or embeddings [n, C] or [B, n, C].
            groups: for `unit="group"`, public: integers [n] that name each row's group, the same for every context; or "phrases": the
                context is ONE list of phrases, or a string that is split into them (`phrases.split_phrases`), and each phrase is encoded by
                itself. With a calibration for phrases and no `groups`, every string is a context that is split.
            fresh: release again with new noise; charged again.
            horizon: ONE context that grows, by at most so many appends, this one included: `Release.append`. Each is charged when it
                comes.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no context of the batch.
        """
        contexts, own = self._named(context, as_groups(groups))
        if horizon is not None:
            return self._open(contexts, own, horizon)
        return Release(self.releases.make(contexts, groups=own, fresh=fresh), self.config, self)

    def _named(
        self,
        context: str | Sequence[str] | torch.Tensor,
        groups: torch.Tensor | Literal["phrases"] | None,
    ) -> tuple[list[PrivateContext], torch.Tensor | None]:
        """Contexts, and the groups that are not phrases."""
        if isinstance(groups, str):
            if groups != "phrases":
                raise ConfigError('`groups` must be integers [n] or "phrases".')
            return [name_phrases(context, self.text)], None
        phrases = groups is None and self.by_phrases
        return name_contexts(context, self.text, self.channels, phrases=phrases), groups

    def _open(self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, horizon: int) -> Release:
        current = self.current()
        growing = open_growing(self, only(contexts), groups, horizon, self.prepare(current), current)
        self.releases.spent.append(growing.spent)
        return Release([growing.latest], self.config, self, growing)

    @locked
    def append(
        self,
        growing: GrowingContext,
        context: str | Sequence[str] | torch.Tensor,
        groups: torch.Tensor | Literal["phrases"] | None,
    ) -> ReleasedContext:
        """See `Release.append`."""
        contexts, own = self._named(context, as_groups(groups))
        return append_to(self, growing, only(contexts), own)

    @property
    def text(self) -> TextSide | None:
        """The text side of the pipeline that joined first."""
        return self._patches[0].text if self._patches else None

    @property
    def channels(self) -> int:
        return int(self.unet.config.cross_attention_dim)

    @property
    def hidden_length(self) -> int:
        return self.text.length if self.text is not None and self.text.available else HIDDEN

    @property
    def by_phrases(self) -> bool:
        """Prompts are split into phrases: the calibration's units are."""
        return self.config.unit == "group" and getattr(self.calibration, "grouping", None) == "phrases"

    # ---- how a release is made (`releases.Making`) -------------------------------------------------------------------------

    def current(self) -> Fingerprint:
        """Of the present weights, and that nothing was lost."""
        self.check_thoroughly()
        return self._current_fingerprint()

    def prepare(self, state: Fingerprint) -> Recipe:
        """Public constants of a release."""
        return self._maker.prepare(state)

    def misfit(self, made: ReleasedContext, state: Fingerprint) -> str | None:
        """Why it cannot serve these weights, or None."""
        return made.misfit(state, projected=self.projects_rows)

    def rehearse(self, contexts: Iterable[PrivateContext]) -> None:
        """See `rehearsal.rehearse`."""
        rehearse(contexts, self.channels, self.config)

    def run(
        self,
        prepared: Recipe,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: Fingerprint,
        entropy: Entropy | None,
    ) -> ReleasedContext:
        """Encodes and releases one charged context; keeps nothing of it but the release."""
        private, public = context.load()
        made = prepared.run(private, groups, entropy)
        return ReleasedContext(
            structures=made.structures,
            guarantee=context.shown(made.guarantee),
            public_rows=public.detach().clone(),
            rows=context.public_length(self.config, self.hidden_length),
            fingerprint=state,
            context=made.context,
        )

    @locked  # it runs layers, which some hosts route for that moment
    def _current_fingerprint(self) -> Fingerprint:
        return fingerprint(self.layers, self.unet.dtype)

    @locked
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> Release:
        """A release that was made elsewhere: verified, and named in the report.

        Raises:
            ReleaseError: it is of texts, or does not fit this model.
        """
        made_for, present = file.terms.host, type(self.unet).__name__
        if not isinstance(file, ReleaseFile):
            raise ReleaseError(
                f"This is a release of texts, and the {present} is protected with mechanism={self.config.mechanism!r}. Call "
                "dpx.unprotect(host) first, and load the release again."
            )
        if present != made_for:
            raise ReleaseError(
                f"The release does not fit this model: it was made for a {made_for}, and this is a {present}. Load the model that it "
                "was made with."
            )
        current = self._current_fingerprint()
        for context in file.contexts:
            require_fit(context.foreign(current, projected=self.projects_rows))
        self.releases.adopt(file.contexts)
        return Release(file.contexts, file.config, self, terms=file.terms)

    def verify(self, contexts: Sequence[ReleasedContext]) -> Fingerprint:
        """The fingerprint of the present weights. Raises ReleaseError unless the releases can serve them."""
        current = self._current_fingerprint()
        for context in contexts:
            require_fit(context.misfit(current, projected=self.projects_rows))
        return current

    # ---- placeholders ------------------------------------------------------------------------------------------------------

    @locked
    def bind_contexts(self, contexts: Sequence[ReleasedContext]) -> tuple[Tag, ...]:
        return tuple(self._bindings.add(bind(c, None, c.tag)) for c in contexts)

    def placeholder(self, tags: Sequence[Tag], rows: int, device: torch.device | str) -> torch.Tensor:
        return make_placeholder(tags, rows, self.channels, self.unet.dtype, device)

    @locked
    @torch.no_grad()
    def inputs(self, release: Release, prompt: str | Sequence[str] | None, **public: Any) -> dict[str, Any]:
        """See `Release.inputs`."""
        if public:
            raise ConfigError(
                f"A diffusers host takes a public `prompt` only, got {', '.join(sorted(public))}."
            )
        self.check_thoroughly()
        rows = {c.rows for c in release.contexts}
        if len(rows) != 1:
            raise ReleaseError("Contexts of different lengths cannot be batched; release them one by one.")
        tags: list[Tag] = []
        for context, text in release.beside(prompt):
            if text is None:
                tags += self.bind_contexts([context])
                continue
            if self.text is None:
                raise ConfigError("This host has no text encoder, so it cannot encode a public prompt.")
            tags.append(self._bindings.add(bind(context, self.text.public_rows(text), new_tag())))
        device = self.unet.device if self.text is None else self.text.pipe._execution_device
        self.activate(unique(tags), device)
        name = "prompt_embeds" if self._patches else "encoder_hidden_states"
        return {name: self.placeholder(tags, rows.pop(), device)}

    @locked
    def activate(self, tags: Sequence[Tag], device: torch.device | str) -> dict[str, LayerTable]:
        """Makes the bindings readable by the processors: the layers' tables, which a graph without gates reads in this thread as well.

        Raises:
            ReleaseError: unknown placeholder, releases that cannot stand in one batch, or ones that the present weights do not fit.
        """
        current = self.verify([b.context for b in self._bindings.find(tags)])
        wanted = tuple(tags), torch.device(device)
        if wanted != self._active or not current.same(self._fingerprint):
            self._set_tables(*wanted, current)
        for name, table in self._serving.items():
            self._processors[name].table = table
        return self._serving

    @torch.inference_mode(False)
    @torch.no_grad()
    def _set_tables(self, tags: tuple[Tag, ...], device: torch.device, current: Fingerprint) -> None:
        self._serving = self._tables.build(self._bindings.find(tags), device, self.unet.dtype, current)
        self._active, self._fingerprint = (tags, device), current

    def hand_out(self, tables: dict[str, LayerTable]) -> None:
        """Makes them what this thread's compiled layers read."""
        for name, table in tables.items():
            self._processors[name].serve(table)

    # ---- report ------------------------------------------------------------------------------------------------------------

    def report(self) -> PrivacyReport:
        """What was promised, spent and left open. Holds no private content; str(), to_dict(), to_json()."""
        heads = [layer.heads for layer in self.layers.values()]
        warned = self._maker.warnings(self._current_fingerprint())
        return self.releases.report(self.words(), heads, warned)

    def words(self) -> HostWords:
        """What is public and what is not covered here."""
        text = self.text if self.text is not None and self.text.available else None
        rows, first = (None, False) if text is None else (text.length, text.first_row_is_public)
        return prompt_words(self.unet, Setting.of(self.config, self.calibration), rows, first, RULE)


__all__ = ["HANDLE_ATTRIBUTE", "ProtectedPipeline"]
