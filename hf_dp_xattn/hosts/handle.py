"""`ProtectedPipeline`: the handle of a protected host. It owns the processors, gates, releases and placeholders."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, DPXAttnError, ProtectionLostError, ReleaseError
from ..mechanisms.contract import PreparedRelease
from ..mechanisms.release import prepare_release
from ..privacy.ledger import Budget, Ledger
from ..report import PrivacyReport
from .access import Access, TextGate
from .architectures import find_layers, rowwise_reason, side_channel_reason, unwrap
from .bindings import Bindings, bind, build_table, unique
from .context import PrivateContext, name_contexts
from .fingerprint import Fingerprint, fingerprint
from .pipelines import PipelinePatch
from .placeholder import Tag, make_placeholder, new_tag, read_tags
from .processor import NO_COPY, DPAttnProcessor, Layout
from .release import Release, ReleasedContext
from .reporting import Spent, build_report
from .rows import layer_specs, project_rows
from .text import TextSide

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration
    from ..privacy.bits import Entropy

MAX_CACHED_RELEASES = 256
HANDLE_ATTRIBUTE = "_dp_xattn_handle"


class ProtectedPipeline:
    """A protected UNet and the pipelines that share it. Made by `dpx.protect`; a context manager that unprotects.

    While it is active, a text prompt or embeddings given to a protected pipeline are private: each context is released once (charged to the
    ledger before it is encoded), and the UNet receives a placeholder in its stead. Not for use by several threads at once, as
    diffusers pipelines are not; a race ends in NaN, never in another context's release.

    *Formal guarantee.* Everything that leaves the host about a private context is post-processing of its `Release`, see `report()`.
    """

    def __init__(
        self,
        unet: Any,  # a UNet2DConditionModel; mypy does not see through its mixins
        config: DPXAttnConfig,
        *,
        calibration: Calibration | None = None,
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        entropy: Entropy | None = None,
    ) -> None:
        self.unet = unet
        self.config = config
        self.calibration = calibration
        self.ledger = Ledger() if ledger is None else ledger
        self.budget = budget or Budget(config.epsilon, config.delta, config.unit, config.neighboring)
        self.layers = find_layers(unet)
        self.access = Access()
        self.entropy = entropy
        self._patches: list[PipelinePatch] = []
        self._gates: list[TextGate] = []
        self._originals = {name: attn.processor for name, attn in self.layers.items()}
        self._processors = {name: DPAttnProcessor() for name in self.layers}
        self._bindings = Bindings()
        self._cache: OrderedDict[tuple[str, bytes], ReleasedContext] = OrderedDict()
        self._spent: list[Spent] = []
        self._tags: tuple[Tag, ...] = ()
        self._device = torch.device("cpu")
        self._seen: tuple[weakref.ref[torch.Tensor], int] | None = None
        self._fingerprint = self._current_fingerprint()
        self._prepared = self._prepare(self._fingerprint)
        self._hook: Any = None
        self.active = False

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Registers the processors and the UNet's gate; undone by `unprotect`."""
        for message in self._prepared.warnings:
            warnings.warn(message, stacklevel=3)
        self.active = True
        setattr(self.unet, HANDLE_ATTRIBUTE, self)
        current = self.unet.attn_processors
        self.unet.set_attn_processor(
            {**current, **{f"{n}.processor": p for n, p in self._processors.items()}}
        )
        self._hook = self.unet.register_forward_pre_hook(self._gate, with_kwargs=True)
        self._set_tables()

    def has(self, pipe: Any) -> bool:
        return any(patch.pipe is pipe for patch in self._patches)

    def join(self, pipe: Any) -> None:
        """Adds a pipeline that shares the UNet."""
        text = TextSide(pipe, self.access)
        if text.available and all(g.encoder is not unwrap(text.encoder) for g in self._gates):
            self._gates.append(TextGate(unwrap(text.encoder), self.access))
        patch = PipelinePatch(pipe, self, text)
        self._patches.append(patch)
        patch.install()

    def unprotect(self) -> None:
        """Restores the host: the original processor objects, no hooks, no attributes. Releases stay valid on disk."""
        if not self.active:
            return
        self.active = False
        for name, attn in self.layers.items():
            if isinstance(
                attn.processor, DPAttnProcessor
            ):  # one that was replaced since is the caller's own choice
                attn.set_processor(self._originals[name])
        if self._hook is not None:
            self._hook.remove()
        for gate in self._gates:
            gate.remove()
        for patch in self._patches:
            patch.remove()
        self.unet.__dict__.pop(HANDLE_ATTRIBUTE, None)
        for processor in self._processors.values():
            processor.table = processor.layout = None

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
            f"delta={c.delta:g}, unit={c.unit!r}, releases={len(self._spent)})"
        )

    # ---- gates -------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        lost: str | None = None
        if not self.active:
            lost = "it was unprotected"
        elif (
            self._hook.id not in self.unet._forward_pre_hooks
            or self.unet.__dict__.get(HANDLE_ATTRIBUTE) is not self
        ):
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
                "or xformers), call dpx.unprotect(pipe), and protect again."
            )

    def check_thoroughly(self) -> None:
        """`check`, and that the model has gained no layer or way around cross-attention since. Before each release and call."""
        self.check()
        names = {
            n for n, m in self.unet.named_modules() if hasattr(m, "get_processor") and n.endswith(".attn2")
        }
        reasons = [*map(rowwise_reason, self.layers.values()), side_channel_reason(self.unet)]
        if names != set(self.layers):
            reasons.append("it has gained or lost attention layers")
        for reason in reasons:
            if reason is not None:
                raise ProtectionLostError(
                    f"The UNet was changed after it was protected: {reason}. Call dpx.unprotect(pipe), undo the change, protect again."
                )

    @contextmanager
    def public(self) -> Iterator[None]:
        """Inside, text is declared PUBLIC: nothing is released or charged, prompts go to the host as they are.

        For baselines and for other uses of a shared text encoder. Holds for the current thread.
        """
        try:
            with self.access.enter("public"):
                self._set_tables()
                yield
        finally:
            self._set_tables()

    def _gate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A trace cannot read markers; there, what is not proven fit becomes NaN in the processors.
        if not torch.compiler.is_compiling():
            self._before_forward(args, kwargs)

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The UNet's gate. Raises before anything runs."""
        self.check()
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        if not isinstance(states, torch.Tensor):
            raise ProtectionLostError(
                "A protected UNet takes encoder_hidden_states as one tensor (no image prompts beside it)."
            )
        if self._seen is not None and self._seen[0]() is states and self._seen[1] == states._version:
            return  # the same tensor at every step: parsed already
        found = read_tags(states)
        tags = unique(found)
        if not tags:
            self._set_layout(None)
            if not self.access.public:
                raise ProtectionLostError(
                    "This UNet is protected and was called with embeddings of which none is a placeholder. Pass release.inputs(), or "
                    "declare the text public with `with protected.public():`."
                )
            return
        for name in ("encoder_attention_mask", "added_cond_kwargs"):
            if kwargs.get(name) is not None:
                raise ConfigError(f"A private context cannot be combined with {name}; pass None.")
        scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0)
        if scale != 1.0:
            raise ConfigError(NO_SCALE)
        self.activate(tags, states.device)
        rows = [i for i, tag in enumerate(found) if tag is not None]
        others = [i for i, tag in enumerate(found) if tag is None]
        order = [tags.index(tag) for tag in found if tag is not None]
        tensors = (torch.tensor(x, dtype=torch.int64, device=states.device) for x in (rows, order, others))
        self._set_layout(Layout(weakref.ref(states), *tensors))
        if not states.is_inference():
            self._seen = (weakref.ref(states), states._version)

    def _set_layout(self, layout: Layout | None) -> None:
        for processor in self._processors.values():
            processor.layout = layout

    # ---- releases ----------------------------------------------------------------------------------------------------------

    def release(
        self,
        context: str | Sequence[str] | torch.Tensor,
        *,
        groups: torch.Tensor | None = None,
        fresh: bool = False,
    ) -> Release:
        """Releases private contexts, one budget each. A context that this handle released before is reused and not charged again.

        Args:
            context: a string, a list of strings, token ids [n] or [B, n], or embeddings [n, C] or [B, n, C].
            groups: for `unit="group"`: integers [n] that name each row's group, the same for every context; public.
            fresh: release again with new noise; charged again.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no context of the batch.
        """
        text = self._patches[0].text if self._patches else None
        contexts = name_contexts(context, text, self.unet.config.cross_attention_dim)
        return Release(self.release_contexts(contexts, groups=groups, fresh=fresh), self.config, self)

    @torch.no_grad()
    def release_contexts(
        self, contexts: Sequence[PrivateContext], *, groups: torch.Tensor | None = None, fresh: bool = False
    ) -> list[ReleasedContext]:
        """One `ReleasedContext` per context; equal contexts share one."""
        self.check_thoroughly()
        current = self._current_fingerprint()
        prepared = self._prepare(current)
        keys = []
        todo: dict[tuple[str, bytes], tuple[PrivateContext, torch.Tensor | None]] = {}
        for context in contexts:
            own = context.groups(groups, self.config.unit)
            key = (self.ledger.digest(context.name), b"" if own is None else own.cpu().numpy().tobytes())
            keys.append(key)
            cached = self._cache.get(key)
            if fresh or cached is None or cached.fingerprint.difference(current) is not None:
                todo[key] = (context, own)
        if prepared.events:
            for digest, _ in todo:
                self.ledger.check(digest, prepared.events, self.budget)
        done = {key: self._cache[key] for key in keys if key not in todo}
        for key, (context, own) in todo.items():
            if prepared.events:
                self.ledger.charge(key[0], prepared.events, self.budget)
            released = self._run(prepared, context, own, current)
            self._spent.append(Spent(key[0], released.guarantee))
            self._cache[key] = done[key] = released
        for key in keys:
            self._cache.move_to_end(key)
        while len(self._cache) > MAX_CACHED_RELEASES:
            self._cache.popitem(last=False)
        return [done[key] for key in keys]

    def _run(
        self,
        prepared: PreparedRelease,
        context: PrivateContext,
        groups: torch.Tensor | None,
        current: Fingerprint,
    ) -> ReleasedContext:
        """Encodes, projects and releases one charged context; keeps nothing of it but the release."""
        private, public = context.load()
        private = private.to(self.unet.dtype)
        pairs = [project_rows(attn, private) for attn in self.layers.values()]
        result = prepared.run(
            [k for k, _ in pairs], [v for _, v in pairs], groups=groups, entropy=self.entropy
        )
        return ReleasedContext(
            structures=result.structures,
            guarantee=result.guarantee,
            public_rows=public.detach().clone(),
            rows=context.rows,
            fingerprint=current,
        )

    def _current_fingerprint(self) -> Fingerprint:
        return fingerprint(self.layers, self.unet.dtype)

    def _prepare(self, current: Fingerprint) -> PreparedRelease:
        """Public constants of a release for the weights as they are now."""
        if not hasattr(self, "_prepared") or self._fingerprint.difference(current) is not None:
            specs = layer_specs(self.layers, self.unet.dtype)
            self._prepared, self._fingerprint = prepare_release(self.config, specs, self.calibration), current
        return self._prepared

    def adopt(self, contexts: Sequence[ReleasedContext]) -> None:
        """Takes in releases that were made elsewhere: verified, and named in the report."""
        self.verify(contexts)
        self._spent += [Spent(None, c.guarantee) for c in contexts]

    def verify(self, contexts: Sequence[ReleasedContext]) -> None:
        """Raises ReleaseError unless the releases were made with the host's present weights."""
        current = self._current_fingerprint()
        for context in contexts:
            difference = context.fingerprint.difference(current)
            if difference is not None:
                raise ReleaseError(
                    f"The release does not fit this model: {difference}. Restore the weights that it was made with (load or unload "
                    "the LoRA), or make a new release, which is charged."
                )

    # ---- placeholders ------------------------------------------------------------------------------------------------------

    def bind_contexts(self, contexts: Sequence[ReleasedContext]) -> tuple[Tag, ...]:
        return tuple(self._bindings.add(bind(c, None, c.tag)) for c in contexts)

    def placeholder(self, tags: Sequence[Tag], rows: int, device: torch.device | str) -> torch.Tensor:
        return make_placeholder(tags, rows, self.unet.config.cross_attention_dim, self.unet.dtype, device)

    @torch.no_grad()
    def inputs(self, release: Release, prompt: str | Sequence[str] | None) -> dict[str, torch.Tensor]:
        """See `Release.inputs`."""
        self.check_thoroughly()
        self.verify(release.contexts)
        rows = {c.rows for c in release.contexts}
        if len(rows) != 1:
            raise ReleaseError("Contexts of different lengths cannot be batched; release them one by one.")
        tags: list[Tag] = []
        for context, text in zip(release.contexts, release.public_texts(prompt), strict=True):
            if text is None:
                tags += self.bind_contexts([context])
                continue
            if not self._patches:
                raise ConfigError("This host has no text encoder, so it cannot encode a public prompt.")
            tags.append(self._bindings.add(bind(context, self._patches[0].text.public_rows(text), new_tag())))
        device = self._patches[0].pipe._execution_device if self._patches else self.unet.device
        self.activate(unique(tags), device)
        name = "prompt_embeds" if self._patches else "encoder_hidden_states"
        return {name: self.placeholder(tags, rows.pop(), device)}

    def activate(self, tags: Sequence[Tag], device: torch.device | str) -> None:
        """Makes the bindings readable by the processors.

        Raises:
            ReleaseError: unknown placeholder, or the weights changed since the release.
        """
        bindings = self._bindings.find(tags)
        self.verify([b.context for b in bindings])
        device = torch.device(device)
        if tuple(tags) == self._tags and device == self._device:
            return
        self._tags, self._device = tuple(tags), device
        self._set_tables()

    @torch.no_grad()
    def _set_tables(self) -> None:
        self._seen = None
        self._set_layout(None)
        if not self.active:
            return
        bindings = self._bindings.find(self._tags)
        allow = torch.tensor(self.access.public > 0, device=self._device)
        for i, (name, attn) in enumerate(self.layers.items()):
            self._processors[name].table = build_table(
                i, attn, bindings, allow, self._device, self.unet.dtype
            )

    # ---- report ------------------------------------------------------------------------------------------------------------

    def report(self) -> PrivacyReport:
        """What was promised, spent and left open. Holds no private content; str(), to_dict(), to_json()."""
        text = self._patches[0].text if self._patches else None
        return build_report(self, self._spent, text)

    @property
    def prepared_warnings(self) -> tuple[str, ...]:
        return self._prepared.warnings


NO_SCALE = (
    "A LoRA scale per call (cross_attention_kwargs={'scale': ...}) would change the layers after the release. Set it before, with "
    "pipe.set_adapters(name, weight) or pipe.fuse_lora(lora_scale=...)."
)

__all__ = ["HANDLE_ATTRIBUTE", "NO_SCALE", "ProtectedPipeline"]
