"""`Release`: what was released of one or several contexts. DP artefacts and public data only."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, DPXAttnError, ReleaseError
from ..hub import find_files, push_files
from ..mechanisms.anchors.rows import ContextRows
from ..mechanisms.structure import AttentionStructure
from ..report import Guarantee
from .fingerprint import FAR, Fingerprint
from .placeholder import Tag, new_tag

if TYPE_CHECKING:
    from .growing import GrowingContext
    from .handle import ProtectedPipeline


@dataclass(frozen=True, eq=False, repr=False)
class ReleasedContext:
    """One context's release, and the exact public rows [p, C] that stand beside it.

    Either a structure (batch 1) per layer, made for the weights that `fingerprint` shows; or `context`: rows of context space, which serve
    all layers, whatever their weights become. rows: length of the placeholder. tag: names the release in placeholders.
    """

    structures: tuple[AttentionStructure, ...]
    guarantee: Guarantee
    public_rows: torch.Tensor
    rows: int
    fingerprint: Fingerprint
    context: ContextRows | None = None
    tag: Tag = field(default_factory=new_tag)

    def __repr__(self) -> str:
        g, layers = self.guarantee, len(self.fingerprint.layers)
        return f"ReleasedContext(rows={self.rows}, mechanism={g.mechanism!r}, epsilon={g.epsilon:g}, layers={layers})"

    def misfit(self, current: Fingerprint) -> str | None:
        """Why it cannot serve its host with the weights as they are now, or None."""
        return self.fingerprint.difference(current, None if self.context is None else math.inf)

    def foreign(self, current: Fingerprint) -> str | None:
        """Why it is not a release for this host, or None; asked once, when it is loaded."""
        return self.fingerprint.difference(current, None if self.context is None else FAR)


@dataclass(frozen=True, eq=False, repr=False)
class Binding:
    """What a placeholder names: a release, and all exact public rows of this call."""

    context: ReleasedContext
    public_rows: torch.Tensor
    tag: Tag


class Release:
    """One release per context; every query, layer, step and image that uses it is post-processing.

    *Formal guarantee.* `guarantees[i]` states what was released of context i; for `mechanism="none"` that is nothing private.
    Made by `protected.release(...)`, saved and loaded with `save_pretrained` / `from_pretrained`.
    """

    def __init__(
        self,
        contexts: Sequence[ReleasedContext],
        config: DPXAttnConfig,
        handle: ProtectedPipeline,
        growing: GrowingContext | None = None,
    ) -> None:
        self._contexts = tuple(contexts)
        self.config = config
        self._handle = weakref.ref(handle)
        self._growing = growing

    def __len__(self) -> int:
        return len(self._contexts)

    def __repr__(self) -> str:
        c = self.config
        return f"Release(contexts={len(self)}, mechanism={c.mechanism!r}, epsilon={c.epsilon:g}, delta={c.delta:g}, unit={c.unit!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(
            "A release is not pickled or deep-copied; use release.save_pretrained(directory), or share the object."
        )

    @property
    def contexts(self) -> tuple[ReleasedContext, ...]:
        return self._contexts

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        """What is promised, one per context."""
        return tuple(c.guarantee for c in self._contexts)

    def inputs(self, prompt: str | Sequence[str] | None = None, **public: Any) -> dict[str, Any]:
        """Keyword arguments for the host: placeholders [len(self), rows, C] without private content.

        Args:
            prompt: public text (or one per context) whose exact rows join the private structure under one softmax.
            public: transformers only: input_ids (and attention_mask) of public documents that join it likewise, and what else `generate`
                takes, which is passed on.

        Returns:
            {"prompt_embeds": ...} for a pipeline, {"encoder_hidden_states": ...} for a bare UNet, {"encoder_outputs": ...} for an
            encoder-decoder model. They name this release only while its host stays protected.

        Raises:
            ReleaseError: the host is no longer protected, or its weights are no longer those of the release (which `anchors` does not
                depend on).
        """
        return self._active_handle().inputs(self, prompt, **public)

    def _active_handle(self) -> ProtectedPipeline:
        handle = self._handle()
        if handle is None or not handle.active:
            raise ReleaseError(
                "The host of this release is no longer protected. Protect it again, and load the release from disk or make a new one "
                "(a new one is charged)."
            )
        return handle

    def append(
        self,
        context: str | Sequence[str] | torch.Tensor,
        *,
        groups: torch.Tensor | Literal["phrases"] | None = None,
    ) -> Release:
        """Adds a further document to a release that was opened with a horizon; later `inputs` read both. Nothing is charged.

        What leaves is covered by the guarantee of the opening: each row (or group) enters once, the noise is shared by all appends. It is
        public when an append comes, and (under replace_one) how many rows it has.

        Args:
            context, groups: as in `protected.release`; ONE context. Groups have numbers that no earlier append used.

        Returns:
            This release.

        Raises:
            BudgetExceededError: all appends are made. ContextError, ConfigError: not valid, or in already; nothing was released.
            ReleaseError: not opened with a horizon, loaded from disk, or its host is no longer protected or has other weights.
        """
        if self._growing is None:
            raise ReleaseError(
                "This release does not grow: it was made without a horizon, or loaded (what is private of a growing release is not saved). "
                "Open one with protected.release(context, horizon=...), which is charged."
            )
        self._contexts = (self._active_handle().append(self._growing, context, groups),)
        return self

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes JSON and safetensors: the structures, the guarantee, the config, the fingerprint of the model.

        Of a release that grows, the present state is written, without what is private: once loaded, it takes no appends.

        Raises:
            ReleaseError: mechanism "none" holds the private rows themselves and is never written.
        """
        from .storage import save_release

        return save_release(self, Path(directory))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, host: Any, **hub_kwargs: Any
    ) -> Release:
        """Loads a release (a folder or a Hub repository) for `host`, which is protected with the release's config if it is not yet.

        No calibration is needed to serve a release; without one, a host that is protected here makes no `anchors` release of its own.

        Raises:
            ReleaseError: damaged, truncated, of another schema, or made for another model.
        """
        from .protect import handle_of, protect_to_serve
        from .storage import JSON_NAME, TENSORS_NAME, load_release

        contexts, config = load_release(
            find_files(name_or_path, (JSON_NAME, TENSORS_NAME), error=ReleaseError, **hub_kwargs)
        )
        existing = handle_of(host)
        handle = protect_to_serve(host, config) if existing is None else existing
        try:
            release = cls(contexts, config, handle)
            handle.adopt(release.contexts)
        except DPXAttnError:
            if existing is None:
                handle.unprotect()
            raise
        return release

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the files of `save_pretrained` to a Hub repository; returns the commit's address."""
        return push_files(
            self.save_pretrained,
            repo_id,
            message="Upload a DP attention release",
            private=private,
            token=token,
        )

    def public_texts(self, prompt: str | Sequence[str] | None) -> list[str | None]:
        """`prompt` as one entry per context."""
        if prompt is None:
            return [None] * len(self)
        from .text import as_texts

        texts = as_texts(prompt, "prompt")
        if len(texts) == 1:
            texts = list(texts) * len(self)
        if len(texts) != len(self):
            raise ConfigError(f"Got {len(texts)} public prompts for {len(self)} contexts.")
        return list(texts)
