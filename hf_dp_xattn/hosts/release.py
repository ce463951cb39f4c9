"""What was released of one or several contexts: DP artefacts and public data only. `protect.Release` can be loaded, too."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, Unpack

import torch

from ..artefacts import CardOptions, PushOptions
from ..config import DPXAttnConfig
from ..errors import ConfigError, DPXAttnError, ReleaseError
from ..report import Guarantee
from .accounts import STAYS
from .diffusers.text_side import as_texts
from .released import ReleasedContext
from .storage import ReleaseFile
from .terms import Terms
from .text.released_dataset import released_dataset
from .text.released_texts import ReleasedText, ReleasedTexts
from .text.text_release_file import TextReleaseFile


class Growing(Protocol):
    """What a release sees of its growing side. latest: what queries read."""

    latest: ReleasedContext


class Releasing(Protocol):
    """What a release asks of the handle that made or loaded it."""

    @property
    def active(self) -> bool: ...
    def terms(self) -> Terms: ...
    def inputs(self, release: Any, prompt: Any, **public: Any) -> dict[str, Any]: ...
    def append(self, growing: Any, context: Any, groups: Any) -> ReleasedContext: ...


class BaseRelease:
    """What a handle makes: `protect.Release` but for loading, which protects a host and so stands above all handles."""

    def __init__(
        self,
        contexts: Sequence[ReleasedContext] | Sequence[ReleasedTexts],
        config: DPXAttnConfig,
        handle: Releasing,
        growing: Growing | None = None,
        *,
        terms: Terms | None = None,
    ) -> None:
        self._contexts: tuple[Any, ...] = tuple(contexts)
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
    def contexts(self) -> tuple[Any, ...]:
        """`ReleasedContext`s, or `ReleasedTexts`."""
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
    ) -> Self:
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
        kind = TextReleaseFile if isinstance(self._contexts[0], ReleasedTexts) else ReleaseFile
        return kind(self.contexts, self.config, self.terms)

    @property
    def texts(self) -> tuple[ReleasedText, ...]:
        """The released texts of each context, of mechanism="library": they may be shown to anyone and given to any model, also to one that
        this package cannot patch.

        Raises:
            ReleaseError: what was released are no texts.
        """
        if not isinstance(self.contexts[0], ReleasedTexts):
            raise ReleaseError("This release holds no texts: mechanism='library' releases such.")
        return tuple(c.text for c in self.contexts)

    @property
    def text(self) -> ReleasedText:
        """The released texts of ONE context: one for each unit, or each text once where units voted (`counts`); `str(release.text)` is
        all of them as one text.

        Raises:
            ReleaseError: of several contexts, or of no texts; see `texts`.
        """
        if len(self.texts) != 1:
            raise ReleaseError(f"This is a release of {len(self)} contexts: see release.texts.")
        return self.texts[0]

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each text of `text` stands in the released list: 1 each where every unit was answered by itself.

        Raises:
            ReleaseError: as `text`.
        """
        return self.text.counts

    def to_dataset(self, embed: Callable[[list[str]], Any] | None = None) -> Any:
        """The released texts of ONE context as a dataset of `datasets`: text, count (how often it stands in the released list), and, for an
        index, embedding. All of it is public: save it, share it, index it (`dataset.add_faiss_index("embedding")`).

        Args:
            embed: a function from a list of texts to rows [n, d]; None: no embeddings.

        Raises:
            ReleaseError: as `text`.
            ConfigError: `datasets` is not installed, or `embed` gives something else than rows.
        """
        return released_dataset(self.text, embed)

    def beside(self, prompt: str | Sequence[str] | None) -> list[tuple[Any, str | None]]:
        """Each context with the public text that joins it.

        Args:
            prompt: one text for all, one for each, or several for ONE context.
        """
        if prompt is None:
            return [(context, None) for context in self.contexts]
        texts = as_texts(prompt, "prompt")
        count = max(len(texts), len(self))
        if {len(texts), len(self)} - {1, count}:
            raise ConfigError(f"Got {len(texts)} public prompts for {len(self)} contexts.")
        return list(zip(self.contexts * (count // len(self)), [*texts] * (count // len(texts)), strict=True))
