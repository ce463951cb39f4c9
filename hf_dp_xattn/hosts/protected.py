"""`Protected`: the handle of a protected host, of whatever kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch

from ..errors import ConfigError, DPXAttnError
from ..mechanisms.groups import as_groups
from ..privacy.ledger import Budget, Ledger
from ..report import PrivacyReport
from .access import NO_COPY
from .accounts import Settings
from .corpus import is_corpus, release_corpus
from .host import Host
from .locks import Lock, locked
from .private_encoding import PrivateEncoding, enclose, enclosed, read_parts
from .release import BaseRelease
from .released import ReleasedContext
from .terms import Terms, terms_of

if TYPE_CHECKING:
    from ..calibration.stored import Stored
    from ..privacy.bits import Entropy
    from .growing import GrowingContext
    from .storage import ReleaseFile
    from .text.text_release_file import TextReleaseFile


class Protected:
    """A protected UNet (with the pipelines that share it) or model. Made by `dpx.protect`; a context manager that unprotects.

    While it is active, what is private reaches the layers as a release, whoever calls the host:

    * of a pipeline, prompts and prompt_embeds; a bare UNet takes `release.inputs()` only;
    * of an encoder-decoder model, what `generate` is given for the encoder;
    * of a decoder-only model, the prefix (a system prompt) that `release` is given; `generate` runs with `release.inputs(input_ids=ids)`;
    * of Mllama, the image;
    * with mechanism="library", the text itself: each of its units is answered once by an entry of a public library, and the host runs on
      these public texts as on any other, with all of its encoders, masks and caches. It refuses to run on anything else.

    Each context is released once (charged to the ledger before it is encoded), and the layers receive a placeholder in its stead. Every
    step, image, beam, sample, turn and layer reads the release.

    *Threads and tasks.* What a forward reads is bound to its thread, a permission (`public`) to its context. Calls of a pipeline wait
    for each other, which diffusers needs (they share a scheduler); so do releases, which need not wait for a call to end.

    *Formal guarantee.* Everything that leaves the host about a private context is post-processing of its `Release`, and of what `report()`
    says is public.

    Args:
        host: not protected yet.
        settings: what `protect` was told.
        release_class: of the releases that are made here.
    """

    def __init__(self, host: Host, settings: Settings, release_class: type[BaseRelease]) -> None:
        self.host, self.config, self._release_class = host, settings.config, release_class
        self.guard = host.guarded(settings)
        self.releases = self.guard.releases

    @property
    def model(self) -> Any:
        """The UNet or model; with mechanism="library" what was protected first, None where there is no host."""
        return self.host.model

    @property
    def text(self) -> Any:
        """The text side of the pipeline that joined first; None where there is none."""
        return self.host.text

    @property
    def calibration(self) -> Stored | None:
        """What was fitted to public contexts."""
        return self.guard.calibration

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
        """The source of the noise or coins; None: the operating system's."""
        return self.releases.entropy

    @property
    def layers(self) -> Mapping[str, Any]:
        """Those that read a context, by name."""
        return self.host.layers

    @property
    def active(self) -> bool:
        """Whether the host is protected by this handle now."""
        return self.guard.active

    @property
    def lock(self) -> Lock:
        """Held while anything of this handle is changed, never while a host runs."""
        return self.guard.lock

    # ---- installing and removing -------------------------------------------------------------------------------------------

    @locked
    def install(self) -> None:
        """Installs the host's gates; undone by `unprotect`."""
        for message in self.guard.warnings():
            warnings.warn(message, stacklevel=6)
        self.guard.active = True
        self.host.install(self.guard, self)

    def unprotect(self) -> None:
        """Restores the host, and all that joined this handle, bit for bit: no hooks, no attributes. Releases stay valid on disk."""
        with self.guard.calling, self.lock:
            if not self.active:
                return
            self.guard.active = False
            self.host.remove()
            self.guard.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unprotect()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)

    def __repr__(self) -> str:
        c = self.config
        state = "active" if self.active else "unprotected"
        return (
            f"Protected({state}, {type(self.model).__name__}, layers={len(self.layers)}, mechanism={c.mechanism!r}, "
            f"epsilon={c.epsilon:g}, delta={c.delta:g}, unit={c.unit!r}, releases={len(self.releases.spent)})"
        )

    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        self.guard.check()

    def public(self) -> AbstractContextManager[None]:
        """Inside, text is declared PUBLIC: nothing is released or charged, prompts go to the host as they are.

        For baselines and for other uses of a shared text encoder. Holds for the running context (a thread, a task of asyncio, and what
        is copied from it meanwhile) until the block is left; in a generator, while the generator itself runs.
        """
        return self.guard.public()

    def encoding(self) -> AbstractContextManager[None]:
        """Inside, the host's encoder runs for the caller, on PRIVATE text: for prompt weighting and the like.

        What it returns is exact and private, and in the caller's hands; nothing is charged yet. Pass it on as a private context:
        `pipe(prompt_embeds=...)`, `protected.release(embeds)`, `model.generate(encoder_outputs=...)`, which release and charge it under its
        own name (not that of its text). A protected UNet or model refuses it by itself in any other place; beside a placeholder
        in one batch, or as a negative prompt, it counts as public, and nothing else refuses it: keep to encoding inside, and give the
        result to nothing else.
        """
        return self.guard.encoding()

    # ---- releases ----------------------------------------------------------------------------------------------------------

    @locked
    def release(
        self,
        context: Any = None,
        *,
        groups: Any = None,
        fresh: bool = False,
        horizon: int | None = None,
        **named: Any,
    ) -> BaseRelease:
        """Releases private contexts, one budget each. A context that this handle released before is reused and not charged again.

        Args:
            context: of a pipeline a string, a list of strings, token ids [n] or [B, n], embeddings [n, C] or [B, n, C], or what
                `private_encode` gives; of a UNet, embeddings. Of an encoder-decoder model token ids, or rows of the encoder's output; of a
                decoder-only one token ids (lists, tensors, or what a chat template gives); of Mllama, rows of the projected vision output.

                With groups="documents" also a dataset of `datasets`, or an iterator, of one document each (a string, or a row with a
                "text"; of an encoder-decoder model with input_ids): ONE context, read as a stream. In a job of several processes
                (accelerate launch, torchrun) each passes its own part, and all hold the one release.
            groups: for `unit="group"`, public: integers [n] that name each row's group, the same for every context. Or how the units of
                ONE context are encoded, each apart from all others: "phrases" of a pipeline (a list of phrases, or a string that is split
                into them by `phrases.split_phrases`; with a calibration for phrases every string is split), "documents" of an
                encoder-decoder model (the batch), "segments" of a decoder-only model (a list of token id lists).
            fresh: release again with new noise; charged again.
            horizon: ONE context that grows, by at most so many appends, this one included: `Release.append`. Each is charged when it
                comes. Not for prefixes and images.
            named: of an encoder-decoder model, in place of `context`, what the encoder takes (input_ids, inputs_embeds, input_features,
                input_values, pixel_values with attention_mask, or encoder_outputs; what the mask hides is no row), and of Mllama what the
                image processor gives (pixel_values, aspect_ratio_ids, aspect_ratio_mask; tiles that the mask hides are no rows).

                text, of token ids: what they are tokens of, where there is such a text: charged as well, so that it has one budget on all
                hosts. One for each context; with "documents" and "segments" one for each unit, or the whole with a unit on each line.

                public_head, of a prefix: how many tokens at its start are PUBLIC (BOS, a chat template's fixed words), or their ids, which
                then stand before those of `context`. They stay exact.

                prefix_bucket, of a prefix: positions that it (or each segment) takes, public; by default the next multiple of 64. A user's
                tokens start behind head and bucket.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no context of the batch.
        """
        if isinstance(context, PrivateEncoding):
            if groups is not None or horizon is not None or named:
                raise ConfigError("A private encoding is released by itself. Nothing was spent.")
            return self._released(self.releases.make([enclosed(self, context)], fresh=fresh))
        if is_corpus(context):
            if groups != "documents" or horizon is not None or named:
                raise ConfigError(
                    'A dataset or iterator is released as one corpus: protected.release(dataset, groups="documents"). Nothing was spent.'
                )
            return self._released([release_corpus(self.guard, context, self.host.document, fresh=fresh)])
        contexts, row_groups = self.host.name(context, as_groups(groups), **named)
        if horizon is None:
            return self._released(self.releases.make(contexts, groups=row_groups, fresh=fresh))
        growing = self.guard.open(contexts, row_groups, horizon)
        return self._released([growing.latest], growing)

    @locked
    def private_encode(self, parts: Sequence[str | tuple[str, float]]) -> PrivateEncoding:
        """A PRIVATE prompt whose words count more or less, as compel's `(red)1.3` does, for a pipeline of Stable Diffusion (1, 2, XL and
        kin) with a mechanism on attention: opaque until `release`, which encodes and charges it.

        A space joins the parts to one prompt. Each token's row is moved along the line from the empty prompt's row through its own: weight
        1 leaves it, 0 makes it the empty prompt's, 1.3 goes further. With unit="group" each part is encoded by itself instead, and is a
        unit.

        *Formal guarantee.* That of `release`, whatever the weights: a weighted row is clipped as any other, and neighbours may differ in
        its text and in its weight. Public is what is public of a plain prompt; with unit="group" how many parts there are. It is charged
        under the names of its plain text too, so that other weights are no other text.

        Args:
            parts: texts, or pairs of a text and its weight (a finite number).

        Returns:
            What `release` takes. Nothing else reads it: it has no attributes, takes part in no computation, and is not shown, copied or
            pickled; nothing was computed yet, and nothing was spent.

        Raises:
            ConfigError, ContextError: not valid, or a host that takes no weights; nothing was spent.

        Example:
            >>> encoding = protected.private_encode(["a", ("red", 1.3), "circle"])  # doctest: +SKIP
            >>> images = pipe(**protected.release(encoding).inputs()).images  # doctest: +SKIP
        """
        return enclose(self, self.host.weighted(*read_parts(parts)))

    def _released(self, contexts: Sequence[Any], growing: GrowingContext | None = None) -> BaseRelease:
        return self._release_class(contexts, self.config, self, growing)

    @locked
    def append(self, growing: GrowingContext, context: Any, groups: Any) -> ReleasedContext:
        """See `Release.append`."""
        contexts, row_groups = self.host.name(context, as_groups(groups))
        return self.guard.append(growing, contexts, row_groups)

    @locked
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> BaseRelease:
        """A release that was made elsewhere: verified, and named in the report. Raises ReleaseError where it does not fit this host."""
        self.guard.take_in(file)
        return self._release_class(file.contexts, file.config, self, terms=file.terms)

    @locked
    @torch.no_grad()
    def inputs(self, release: BaseRelease, prompt: Any = None, **public: Any) -> dict[str, Any]:
        """See `Release.inputs`."""
        self.guard.check_inputs()
        return self.host.inputs(release, prompt, **public)

    def chat(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        *,
        public_system: bool = False,
        **options: Any,
    ) -> str:
        """The model's reply to a conversation whose first message, the system prompt, is private: released once, and charged; later turns
        read the same release.

        Args:
            tokenizer: of the model, with a chat template.
            messages: role and content, the private system prompt first; all others are PUBLIC. With unit="group" its lines are the units
                (with mechanism="library" what the library says).
            public_system: see `split_chat`.
            options: of `model.generate`; and `prefix_bucket`, see `release`.

        Returns:
            The text of the reply.

        Raises:
            ConfigError, ContextError: not valid, or the host takes no chat; nothing was spent.
            BudgetExceededError: see `release`.

        Example:
            >>> model = AutoModelForCausalLM.from_pretrained("chat")  # doctest: +SKIP
            >>> protected = dpx.protect(model, dpx.DPXAttnConfig(unit="group"))  # doctest: +SKIP
            >>> protected.chat(tokenizer, messages, max_new_tokens=20)  # doctest: +SKIP
            'hello ...'
        """
        if options.get("num_return_sequences", 1) != 1 or options.get("return_dict_in_generate"):
            raise ConfigError(
                "A chat has one reply, as text. For more, call model.generate(**release.inputs(...)) yourself. Nothing was spent."
            )
        return self.host.chat(self.release, tokenizer, messages, public_system, **options)

    # ---- report ------------------------------------------------------------------------------------------------------------

    def report(self) -> PrivacyReport:
        """What was promised, spent and left open. Holds no private content; str(), to_dict(), to_json()."""
        return self.guard.report()

    def terms(self) -> Terms:
        """What a release carries along about its host."""
        return terms_of(self.guard.report(entries=False), self.host.parts)
