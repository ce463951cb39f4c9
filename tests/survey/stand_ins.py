"""What diffusers' own tests fetch from the Hub, made in memory: tokenizers of single characters, small configurations, processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import huggingface_hub
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHARACTERS = [chr(c) for c in range(33, 127)]
SIZE = 1000  # of the vocabularies of the tests' tiny models
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in "
    "m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
)


def clip_words(length: int = 77) -> Any:
    """CLIP's models of these tests take the token of the highest id for the end."""
    pieces = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    fill = [f"[{i}]" for i in range(SIZE - 2 - len(pieces))]
    vocabulary = {t: i for i, t in enumerate([*pieces, *fill, "<|startoftext|>", "<|endoftext|>"])}
    return tf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def words(length: int = 512, *, start: bool = False, end: bool = True, padding: str = "right") -> Any:
    """One token a character; `</s>` behind a text, `<s>` before it."""
    pieces = ["<pad>", "</s>", "<s>", "<unk>", *SPECIAL, "▁", *CHARACTERS]
    vocabulary = {t: i for i, t in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    single = " ".join([*(["<s>"] if start else []), "$A", *(["</s>"] if end else [])])
    made.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=length,
        padding_side=padding,
    )
    wrapped.chat_template = CHAT
    return wrapped


def few_words() -> Any:
    """Of eight tokens, for models that have no more: letters fall into three."""
    made = words(end=False)
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(["<pad>", "</s>", "<s>", "<unk>", "▁", *"abc"])}, [])
    )
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            *(
                normalizers.Replace(Regex(these), one)
                for these, one in (("[a-h]", "a"), ("[i-q]", "b"), ("[r-z]", "c"))
            ),
            normalizers.Replace(Regex("[^abc ]"), "a"),
        ]
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])  # as Gemma's
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        model_max_length=made.model_max_length,
    )


def t5_config() -> Any:
    return tf.T5Config(
        vocab_size=1103,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=5,
        num_decoder_layers=5,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _tokenizer(cls: type, name: str, **options: Any) -> Any:
    if issubclass(cls, tf.CLIPTokenizer) or "random-clip" in name.lower():
        return clip_words()
    if "dummy-gemma" in name:
        return few_words()
    return words(int(options.get("model_max_length", 512)), end="qwen" not in name.lower())


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        **more,
    }


def _text(**more: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    return {**_vision(), **heads, **tokens, "max_position_embeddings": 1024, **more}


def _qwen2_vl() -> Any:
    return tf.Qwen2VLConfig(
        text_config=_text(
            hidden_size=16, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0]}
        ),
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 16, "mlp_ratio": 2},
        image_token_id=SPECIAL.index("<|image_pad|>") + 4,
        video_token_id=SPECIAL.index("<|video_pad|>") + 4,
        vision_start_token_id=SPECIAL.index("<|vision_start|>") + 4,
        vision_end_token_id=SPECIAL.index("<|vision_end|>") + 4,
    )


def _qwen3_vl() -> Any:
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 16, "intermediate_size": 37}
    return tf.Qwen3VLConfig(
        text_config=_text(
            hidden_size=16, head_dim=8, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}
        ),
        vision_config={
            **sizes,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        image_token_id=SPECIAL.index("<|image_pad|>") + 4,
        video_token_id=SPECIAL.index("<|video_pad|>") + 4,
        vision_start_token_id=SPECIAL.index("<|vision_start|>") + 4,
        vision_end_token_id=SPECIAL.index("<|vision_end|>") + 4,
    )


def _gemma3() -> Any:
    return tf.Gemma3Config(
        text_config=_text(head_dim=8, num_hidden_layers=3, query_pre_attn_scalar=8),
        vision_config=_vision(image_size=32, patch_size=8),
        mm_tokens_per_image=4,
        image_token_index=SPECIAL.index("<image_soft_token>") + 4,
    )


def _bert() -> Any:
    return tf.BertConfig(vocab_size=1124, **_vision(), max_position_embeddings=512)


def _umt5() -> Any:
    return tf.UMT5Config(
        **{n: v for n, v in t5_config().to_dict().items() if n not in ("model_type", "transformers_version")}
    )


def _clip_text() -> Any:
    return tf.CLIPTextConfig(
        vocab_size=SIZE, **_vision(), projection_dim=32, bos_token_id=SIZE - 2, eos_token_id=SIZE - 1
    )


# by a part of the name on the Hub
CONFIGS: dict[str, Callable[[], Any]] = {
    "clip-text": _clip_text,
    "umt5": _umt5,
    "t5": t5_config,
    "qwen2vl": _qwen2_vl,
    "qwen3vl": _qwen3_vl,
    "gemma3": _gemma3,
    "bert": _bert,
    "llama": lambda: tf.LlamaConfig(**_text(hidden_size=16)),
    "siglip": lambda: tf.SiglipVisionConfig(**_vision(image_size=30, patch_size=2)),
}


def _config(cls: Any, name: str, **options: Any) -> Any:
    for key, make in CONFIGS.items():
        if key in name.lower():
            return make()
    raise OSError(f"No stand-in for the configuration {name}.")


def _model(cls: Any, name: str, **options: Any) -> Any:
    return cls(_config(cls, name))


def _processor(cls: Any, name: str, **options: Any) -> Any:
    """Of pictures and text: of Qwen-VL where the name says nothing else."""
    kind = tf.Qwen2VLProcessor if cls is tf.AutoProcessor else cls
    images = {"image_processor": tf.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)}
    videos = {"Qwen2VLProcessor": "Qwen2VLVideoProcessor", "Qwen3VLProcessor": "Qwen3VLVideoProcessor"}
    if kind.__name__ in videos:
        images["video_processor"] = getattr(tf, videos[kind.__name__])()
    return kind(tokenizer=words(end=False), chat_template=CHAT, **images)


def _own_defaults(cls: Any, name: str, **options: Any) -> Any:
    return cls(**({"size": {"height": 32, "width": 32}} if "DPT" in cls.__name__ else {}) | options)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Inside, `from_pretrained` of names of the Hub gives stand-ins, and what has none fails."""
    with ExitStack() as stack:

        def patch(owner: Any, make: Callable[..., Any]) -> None:
            original = owner.__dict__["from_pretrained"]

            def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
                if os.path.isdir(str(name)):
                    return original.__get__(None, cls)(name, *args, **kwargs)
                return make(cls, str(name), **kwargs)

            stack.enter_context(mock.patch.object(owner, "from_pretrained", classmethod(from_pretrained)))

        for owner, make in (
            (tf.PreTrainedTokenizerBase, _tokenizer),
            (tf.AutoTokenizer, _tokenizer),
            (tf.AutoConfig, _config),
            (tf.PreTrainedModel, _model),
            (tf.ProcessorMixin, _processor),
            (tf.AutoProcessor, _processor),
            (tf.FeatureExtractionMixin, _own_defaults),
            (tf.image_processing_base.ImageProcessingMixin, _own_defaults),
        ):
            patch(owner, make)
        stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        yield
