"""`Release`: what was released of one or several contexts. DP artefacts and public data only."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Unpack

import torch

from ..artefacts import CardOptions, HubOptions, PushOptions
from ..config import DPXAttnConfig
from ..errors import ConfigError, DPXAttnError, ReleaseError
from ..privacy.ledger import Ledger
from ..report import Guarantee
from .accounts import STAYS
from .released import ReleasedContext
from .storage import ReleaseFile
from .terms import Terms
from .text.text_release_file import TextReleaseFile, load_release, locate_release


class Growing(Protocol):
    """What a release sees of its growing side. latest: what queries read."""

    latest: ReleasedContext


class Releasing(Protocol):
    """What a release asks of the handle that made or loaded it."""

    @property
    def active(self) -> bool: ...
    def terms(self) -> Terms: ...
    def inputs(self, release: Release, prompt: Any, **public: Any) -> dict[str, Any]: ...
    def append(self, growing: Any, context: Any, groups: Any) -> ReleasedContext: ...
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> Release: ...
    def unprotect(self) -> None: ...


class Server(Protocol):
    """Gives the handle that serves a loaded release on a host, and whether the host was protected for it only now."""

    def __call__(self, host: Any, config: DPXAttnConfig, ledger: Ledger | None) -> tuple[Releasing, bool]: ...


class Release:
    """One release per context; every query, layer, step and output that uses it is post-processing.

    *Formal guarantee.* `guarantees[i]` states what was released of context i; for `mechanism="none"` that is nothing private.
    Made by `protected.release(...)`, saved and loaded with `save_pretrained` / `from_pretrained`; not by hand.

    Args:
        contexts: what was released of each.
        config: under which.
        handle: that made or loaded it; held weakly.
        growing: its growing side, where there is one.
        terms: what was public and not covered where it was made; None: here.

    Example:
        >>> release = dpx.protect(pipe, dpx.DPXAttnConfig(epsilon=8.0)).release("a red circle")
        >>> images = pipe(**release.inputs(), num_inference_steps=2).images
        >>> folder = release.save_pretrained("red-circle")
        >>> again = dpx.Release.from_pretrained("red-circle", host=pipe)
    """

    server: ClassVar[Server]  # `protect.py` says it: `protect` stands above all that makes releases

    def __init__(
        self,
        contexts: Sequence[ReleasedContext],
        config: DPXAttnConfig,
        handle: Releasing,
        growing: Growing | None = None,
        *,
        terms: Terms | None = None,
    ) -> None:
        self._contexts = tuple(contexts)
        self.config = config
        self._handle = weakref.ref(handle)
        self._growing = growing
        self._loaded = terms is not None
        self._terms = handle.terms() if terms is None else terms

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
        return self._contexts if self._growing is None else (self._growing.latest,)

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        """What is promised, one per context."""
        return tuple(c.guarantee for c in self.contexts)

    @property
    def terms(self) -> Terms:
        """What is public and what is not covered, in the words of the report of the host that made it."""
        handle = self._handle()
        if handle is not None and not self._loaded:
            self._terms = handle.terms()
        return self._terms

    def inputs(self, prompt: str | Sequence[str] | None = None, **public: Any) -> dict[str, Any]:
        """Keyword arguments for the host: placeholders [len(self), rows, C] without private content.

        Args:
            prompt: public text (one for all contexts, one for each, or several for ONE) whose exact rows join the private structure under
                one softmax.
            public: transformers only: input_ids (and attention_mask) of public documents that join it likewise, or, for a decoder-only
                model, of the user's own text, which follows the private prefix; and what else `generate` takes, which is passed on.

        Returns:
            {"prompt_embeds": ...} for a pipeline, {"encoder_hidden_states": ...} for a bare UNet, {"encoder_outputs": ...} for an
            encoder-decoder model, {"input_ids", "attention_mask", "past_key_values": ...} for a decoder-only one. They name this release
            only while its host stays protected.

        Raises:
            ReleaseError: the host is no longer protected, or its weights are no longer those of the release (which `anchors` does not
                depend on).
        """
        return self._active_handle().inputs(self, prompt, **public)

    def _active_handle(self) -> Releasing:
        handle = self._handle()
        if handle is None or not handle.active:
            raise ReleaseError(
                f"The host of this release is no longer protected. Protect it again ({STAYS}), and load the release from disk or make a "
                "new one, which is charged, and refused beyond the budget."
            )
        return handle

    def append(
        self,
        context: str | Sequence[str] | torch.Tensor,
        *,
        groups: torch.Tensor | Literal["phrases"] | None = None,
    ) -> Release:
        """Adds a further document to a release that was opened with a horizon; later `inputs` read both.

        What leaves is covered by the guarantee of the opening: each row (or group) enters once, the noise is shared by all appends. So the
        document is charged, under its own name, what the opening cost; what is in already pays nothing more. It is public when an append
        comes, and (under replace_one) how many rows it has.

        Args:
            context: as in `protected.release`; ONE context.
            groups: as in `protected.release`, with numbers that no earlier append used.

        Returns:
            This release.

        Raises:
            BudgetExceededError: all appends are made, or this document has spent its budget elsewhere; nothing was spent.
            ContextError, ConfigError: not valid, or in already; nothing was released.
            ReleaseError: not opened with a horizon, loaded from disk, or its host is no longer protected or has other weights.
        """
        if self._growing is None:
            raise ReleaseError(
                "This release does not grow: it was made without a horizon, or loaded (what is private of a growing release is not saved). "
                "Open one with protected.release(context, horizon=...), which is charged."
            )
        self._active_handle().append(self._growing, context, groups)
        return self

    def save_pretrained(self, directory: str | os.PathLike[str], **card: Unpack[CardOptions]) -> Path:
        """Writes JSON and safetensors (the structures, the guarantee, the config, the fingerprint of the model) and a card.

        Of a release that grows, the present state is written, without what is private: once loaded, it takes no appends. A README.md that
        somebody else wrote stays as it is.

        Args:
            directory: a folder, made if it is not there.
            card: license, base_model, utility (`artefacts.CardOptions`).

        Raises:
            ReleaseError: mechanism "none" holds the private rows themselves, and seeded noise can be taken off again; such a release is
                never written.
        """
        return self._file().save_pretrained(directory, **card)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        host: Any,
        ledger: Ledger | None = None,
        **options: Unpack[HubOptions],
    ) -> Release:
        """Loads a release (a folder or a Hub repository, `HubOptions`) for `host`, which is protected with the release's config if it
        is not yet.

        No calibration or ledger is needed to serve a release. A host that is protected here makes no release of its own without a ledger,
        and no `anchors` release at all (protect it first, with the calibration).

        Args:
            name_or_path: folder or Hub id.
            host: what it is to serve.
            options: revision, token, subfolder, ... (`artefacts.HubOptions`).
            ledger: what has been spent so far, if the host is to make releases too. The variable HF_DP_XATTN_LEDGER gives one as well.

        Raises:
            ConfigError: the host is protected already, with another ledger.
            ReleaseError: damaged, truncated, of another schema, or made for another model. The host is as it was.
        """
        file = load_release(locate_release(name_or_path, **options))
        handle, is_new = cls.server(host, file.config, ledger)
        try:
            release = handle.take_in(file)
        except DPXAttnError:
            if is_new:
                handle.unprotect()
            raise
        return release

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Uploads the files of `save_pretrained` to a Hub repository; returns the commit's address.

        Args:
            repo_id: owner/name.
            options: token, private, license, ... (`artefacts.PushOptions`).

        Raises:
            HubError: the upload failed, and the repository is as it was.
            ReleaseError: see `save_pretrained`.
            ConfigError: unknown options.
        """
        return self._file().push_to_hub(repo_id, **options)

    def _file(self) -> ReleaseFile | TextReleaseFile:
        return ReleaseFile(self.contexts, self.config, self.terms)

    def beside(self, prompt: str | Sequence[str] | None) -> list[tuple[ReleasedContext, str | None]]:
        """Each context with the public text that joins it.

        Args:
            prompt: one text for all, one for each, or several for ONE context.
        """
        if prompt is None:
            return [(context, None) for context in self.contexts]
        from .diffusers.text_side import as_texts

        texts = as_texts(prompt, "prompt")
        count = max(len(texts), len(self))
        if {len(texts), len(self)} - {1, count}:
            raise ConfigError(f"Got {len(texts)} public prompts for {len(self)} contexts.")
        return list(zip(self.contexts * (count // len(self)), [*texts] * (count // len(texts)), strict=True))
