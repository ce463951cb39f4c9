"""What the command line does with each family of hosts: how a private text is released, and what is made of a release."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from .models import load_tokenizer
from .public_head import check_chat
from .public_numbers import NOTHING, check_decoder_room, check_pictures
from .texts import (
    chat_head,
    has_template,
    lines_of,
    plain_ids,
    read_documents,
    read_prefix,
    read_question,
    tokenize,
    without_system,
)

if TYPE_CHECKING:
    from .texts import PrefixText

NEW_TOKENS = 60
IMAGE = (
    "The private context of this model is an image, which the command line does not read: in Python, protected.release(**processor."
    "image_processor(image, return_tensors='pt'))."
)


class Family:
    """One family. foreign: options that it has no use for, by what is said of them.

    Args:
        handle: of the protected host.
        args: of the command.
    """

    foreign: ClassVar[dict[str, tuple[str, ...]]] = {}
    draws: ClassVar[bool] = False  # pictures, and no texts
    joint: ClassVar[str] = "\n"  # between units of a text

    def __init__(self, handle: Any, args: argparse.Namespace) -> None:
        self.handle, self.args = handle, args
        self.apart = handle.config.unit == "group"

    def check(self) -> None:
        """Raises ConfigError for options of other families, before anything is spent."""
        for told, names in self.foreign.items():
            given = [f"--{n.replace('_', '-')}" for n in names if is_given(getattr(self.args, n, None))]
            if given:
                raise ConfigError(told.format(given=", ".join(given), first=given[0]))

    def release(self, text: str) -> Any:
        """Releases one private text; with unit="group", its lines (phrases of a prompt) are the groups."""
        raise NotImplementedError

    def prepare(self, release: Any | None, private: str | None) -> None:
        """Reads and checks all that is public of `generate`, before anything is spent.

        Args:
            release: a saved one, or None.
            private: the text that is to be released, or None.
        """
        raise NotImplementedError

    def draw(self, release: Any) -> list[Any]:
        """Pictures or texts of a release."""
        raise NotImplementedError

    def draw_plain(self, text: str | None) -> list[Any]:
        """What the host makes of a PUBLIC text, or of none, without a protection; nothing where it needs one."""
        raise NotImplementedError

    def save(self, drawn: list[Any]) -> dict[str, Any]:
        """Writes what was drawn to --out, where there is one: "files", "texts"."""
        raise NotImplementedError


class Prompts(Family):
    """Pipelines of pictures."""

    foreign: ClassVar = {
        "{first} is for decoder-only models.": ("chat", "prefix_bucket"),
        "{first} is for texts, and this is a pipeline of pictures.": ("new_tokens",),
        "{first} is for encoder-decoder models.": ("begin",),
    }
    draws, joint = True, ", "

    @property
    def pipe(self) -> Any:
        """The pipeline that draws."""
        return self.handle.text.pipe

    def release(self, text: str) -> Any:
        return self.handle.release(text, groups="phrases" if self.apart else None)

    def check_public(self, text: str) -> None:
        """Refuses public words now, not after the charge."""
        self.handle.text.tokenize(text)

    def prepare(self, release: Any | None, private: str | None) -> None:
        args = self.args
        check_pictures(self.pipe, args)
        if args.public is not None:
            self.check_public(args.public)

    def draw(self, release: Any) -> list[Any]:
        return self._pictures(release.inputs(prompt=self.args.public))

    def draw_plain(self, text: str | None) -> list[Any]:
        with self.handle.public():
            return self._pictures({"prompt": text or ""})

    def _pictures(self, inputs: dict[str, Any]) -> list[Any]:
        import torch

        args, pipe = self.args, self.pipe
        pipe.set_progress_bar_config(disable=args.json)
        named = {
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance,
            "height": args.height,
            "width": args.width,
        }
        if args.seed is not None:
            named["generator"] = torch.Generator().manual_seed(args.seed)
        given = {k: v for k, v in named.items() if v is not None}
        return list(pipe(**inputs, **given).images)

    def save(self, drawn: list[Any]) -> dict[str, Any]:
        out = Path(self.args.out)
        files = [out] if len(drawn) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(drawn))]
        for image, file in zip(drawn, files, strict=True):
            image.save(file)
        return {"files": [str(f) for f in files]}


class Texts(Family):
    """Models of text. public: of their inputs; skip: how many of their tokens stand before the answer."""

    public: dict[str, Any]
    skip: int

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS if self.args.new_tokens is None else int(self.args.new_tokens)

    def begins(self, inputs: dict[str, Any]) -> int:
        """How many tokens the output begins with, which are not printed again."""
        return self.skip

    def draw(self, release: Any) -> list[Any]:
        return self._texts(release.inputs(**self.public), self.begins)

    def _texts(self, inputs: dict[str, Any], begins: Callable[[dict[str, Any]], int]) -> list[str]:
        import torch

        args = self.args
        tokenizer = load_tokenizer(args.model)
        options: dict[str, Any] = {"max_new_tokens": self.new_tokens}
        if args.seed is not None:
            torch.manual_seed(args.seed)
            options["do_sample"] = True
        found = self.handle.model.generate(**inputs, **options)
        texts: list[str] = tokenizer.batch_decode(found[:, begins(inputs) :], skip_special_tokens=True)
        return texts

    def _plain_texts(self, inputs: dict[str, Any], skip: int) -> list[str]:
        device = self.handle.model.device
        with self.handle.public():
            return self._texts({name: ids.to(device) for name, ids in inputs.items()}, lambda _: skip)

    def save(self, drawn: list[Any]) -> dict[str, Any]:
        out = self.args.out
        if out is None:
            return {"texts": drawn}
        Path(out).write_text("\n".join(drawn) + "\n", encoding="utf-8")
        return {"texts": drawn, "files": [out]}


_PICTURES = {"{given}: for pictures, and this model writes text.": ("steps", "guidance", "height", "width")}


class Documents(Texts):
    """Encoder-decoder models."""

    foreign: ClassVar = {"{first} is for decoder-only models.": ("chat", "prefix_bucket"), **_PICTURES}

    def draw_plain(self, text: str | None) -> list[Any]:
        if text is None:
            return []
        begin = {name: ids for name, ids in self.public.items() if name == "decoder_input_ids"}
        return self._plain_texts({**read_documents(self.args.model, [text]), **begin}, self.skip)

    def read_public(self, ids: Any) -> dict[str, Any]:
        """What is given to `release.inputs` of the public words, ids [1, m]."""
        return {"input_ids": ids}

    def release(self, text: str) -> Any:
        documents = read_documents(self.args.model, lines_of(text) if self.apart else [text])
        return self.handle.release(documents, groups="documents" if self.apart else None, text=text)

    def prepare(self, release: Any | None, private: str | None) -> None:
        from ..hosts.transformers.encoder_decoder.public_documents import starts_of

        args = self.args
        load_tokenizer(args.model)
        self.public, self.skip = {}, 0
        if args.public is not None:
            self.public |= self.read_public(_words(tokenize(args.model, args.public)[0]))
        if args.begin is not None:
            start = starts_of(self.handle.model, [plain_ids(args.model, args.begin)])[0]
            self.public["decoder_input_ids"], self.skip = start.unsqueeze(0), len(start)
        check_decoder_room(self.handle.model, max(1, self.skip) + self.new_tokens - 1)


class Prefixes(Texts):
    """Decoder-only models."""

    foreign: ClassVar = {**_PICTURES, "{first} is for encoder-decoder models.": ("begin",)}

    def draw_plain(self, text: str | None) -> list[Any]:
        import torch

        args = self.args
        if text is None:
            ids = without_system(args.model, args.public, chat=bool(args.chat))
        else:
            prefix = read_prefix(args.model, text, chat=bool(args.chat))
            assert isinstance(prefix.context, torch.Tensor)
            ids = torch.cat([prefix.head, prefix.context, self.public["input_ids"][0]])
        whole = ids.unsqueeze(0)
        return self._plain_texts({"input_ids": whole, "attention_mask": torch.ones_like(whole)}, len(ids))

    def _prefix(self, text: str) -> PrefixText:
        return read_prefix(self.args.model, lines_of(text) if self.apart else text, chat=bool(self.args.chat))

    def release(self, text: str) -> Any:
        prefix = self._prefix(text)
        return self.handle.release(
            prefix.context,
            groups="segments" if self.apart else None,
            public_head=prefix.head,
            prefix_bucket=self.args.prefix_bucket,
            text=text,
        )

    def prepare(self, release: Any | None, private: str | None) -> None:
        if self.args.public is None:
            raise ConfigError("A decoder-only model answers something: --public TEXT is the user's turn.")
        ids = _words(read_question(self.args.model, self.args.public, chat=bool(self.args.chat)))
        self.public, self.skip = {"input_ids": ids}, ids.shape[1]
        if private is not None:  # with a saved release `generate` itself says so, at no cost
            self._check_room(private)
        if release is not None:
            check_chat(self.handle, release, self.args)

    def _check_room(self, private: str) -> None:
        """Raises ConfigError where the model has too few positions for the text."""
        from ..hosts.transformers.decoder_only.prefix_attention import check_window
        from ..hosts.transformers.decoder_only.prefix_contexts import padded_length

        prefix = self._prefix(private)
        parts = prefix.context if isinstance(prefix.context, list) else [prefix.context]
        slots = padded_length(max(map(len, parts), default=0), self.args.prefix_bucket)
        try:
            check_window(self.handle.host.limit, len(prefix.head) + slots + self.skip + self.new_tokens - 1)
        except ConfigError as error:
            raise ConfigError(f"{error} {NOTHING}") from None


class Images(Texts):
    """Models whose text reads an image."""

    def check(self) -> None:
        raise ConfigError(IMAGE)


_BUCKET = {
    "--prefix-bucket is not for --mechanism library: released text has a length of its own.": (
        "prefix_bucket",
    )
}


class ReleasedPrompts(Prompts):
    """Pipelines of pictures that read released text."""

    foreign: ClassVar = {**_BUCKET, **Prompts.foreign}

    @property
    def pipe(self) -> Any:
        return self.handle.model

    def release(self, text: str) -> Any:
        return self.handle.release(text)

    def check_public(self, text: str) -> None:
        return


class ReleasedDocuments(Documents):
    """Encoder-decoder models that read released text."""

    foreign: ClassVar = {**_BUCKET, **Documents.foreign}

    def release(self, text: str) -> Any:
        return self.handle.release(text)

    def read_public(self, ids: Any) -> dict[str, Any]:
        return {"prompt": self.args.public}


class ReleasedPrefixes(Prefixes):
    """Decoder-only models that read released text, which is as long as it is."""

    foreign: ClassVar = {**_BUCKET, **Prefixes.foreign}

    def __init__(self, handle: Any, args: argparse.Namespace) -> None:
        super().__init__(handle, args)
        if args.chat is None:
            args.chat = has_template(args.model)

    def release(self, text: str) -> Any:
        return self.handle.release(text)

    def prepare(self, release: Any | None, private: str | None) -> None:
        super().prepare(None, None)
        if self.args.chat:
            self.public["public_head"] = chat_head(self.args.model)

    def begins(self, inputs: dict[str, Any]) -> int:
        return int(inputs["input_ids"].shape[1])  # the released text stands before the user's own


FAMILIES: dict[str, type[Family]] = {
    "diffusers": Prompts,
    "encoder-decoder": Documents,
    "decoder-only": Prefixes,
    "image-text": Images,
}
RELEASED: dict[bool | None, type[Family]] = {
    None: ReleasedPrompts,
    True: ReleasedDocuments,
    False: ReleasedPrefixes,
}
"""By whether a model of transformers has an encoder."""


def family_of(handle: Any, args: argparse.Namespace) -> Family:
    """The family of a protected host. Raises ConfigError, before anything is spent, for what the command line cannot do with it."""
    if by_text(handle):
        kind = RELEASED[getattr(handle.model.config, "is_encoder_decoder", None)]
    else:
        kind = FAMILIES[handle.host.family]
    found = kind(handle, args)
    found.check()
    return found


def by_text(handle: Any) -> bool:
    """Whether a host reads released text."""
    return KNOWN[handle.config.mechanism].releases == "texts"


def _words(ids: Any) -> Any:
    if not ids.shape[1]:
        raise ConfigError(f"--public holds no words. {NOTHING}")
    return ids


def is_given(value: Any) -> bool:
    """Whether an option was given; 0 was."""
    return value is not None and value is not False
