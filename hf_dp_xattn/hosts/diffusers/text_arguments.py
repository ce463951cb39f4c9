"""Which arguments of a pipeline's call hold private text, which may hold what was made of it, and which are public.

What is not known to be public, and holds text, is refused: pipelines of other authors name their texts as they like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ConfigError

PRIVATE = re.compile(
    r"(?!neg|num_|use_|add_|system|chi_)([a-z0-9_]+_)?prompt(_\d)?|lyrics|transcription|text|caption|instruction|(source|target)_subject_category"
)
"""Arguments that hold private text, to be released."""
OTHERS = re.compile(
    r"(?!neg|num_|callback)(.*(prompt|text|token|caption).*(embed|mask|latents|segments|cu_seqlens|features|_ids).*|messages|"
    r"text_model_output|(source|target)_embeds|connector_\w+_embeds|encoder_hidden_states|(encoder_|input_)?attention_mask|input_ids|"
    r"inputs_embeds|controlnet_pooled_projections)"
)
"""Arguments that may hold what was made of private text, or private text in another form."""
PUBLIC = re.compile(
    r"neg.*|(prior_)?callback.*|output_type|system_prompt|complex_human_instruction|chi_prompt|prompt_template|(.*_)?mode|task_type|"
    r"sampling_\w+|cache_implementation|mixed_precision\w*|condition_video_keep|vocal_language|keyscale|timesignature|fonts|"
    r"complete_track_classes|action|(.*_)?image|(.*_)?video|device|scheduler\w*|sigma_schedule|\w+_type|\w+_format|\w+_policy|\w+_method"
)
"""Arguments whose strings are public: settings, and texts that are not a prompt."""


def check_texts(
    arguments: Mapping[str, Any],
    defaults: Mapping[str, Any],
    more: str | None,
    private: re.Pattern[str] | None = PRIVATE,
) -> None:
    """Of a call that is not declared public.

    Args:
        arguments: by name.
        defaults: of the call's signature.
        more: the name under which further arguments stand, of which none is released.
        private: which are released.

    Raises:
        ConfigError: text in an argument that is not known, or something that may be made of text. Nothing was spent.
    """
    for name, value in arguments.items():
        if name == more and isinstance(value, Mapping):
            check_texts(value, {}, None, None)
        elif value is None:
            continue
        elif OTHERS.fullmatch(name):
            raise ConfigError(
                f"`{name}` may hold private text in a form that cannot be released as text: pass the text itself, as `prompt`. Only if it "
                "is public, call the pipeline inside `with protected.public():`. Nothing was spent."
            )
        elif not (private is not None and private.fullmatch(name)) and not PUBLIC.fullmatch(name):
            default = defaults.get(name)
            if any(_texts(value)) and not (isinstance(default, type(value)) and value == default):
                raise ConfigError(
                    f"`{name}` holds text, and is not known to be public: pass a private text as `prompt`. Only if all of this call is "
                    "public, make it inside `with protected.public():`. Nothing was spent."
                )


def _texts(value: Any) -> Iterator[str]:
    """The strings in an argument, but for names in a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _texts(inner)
