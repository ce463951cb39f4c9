"""Chat templates: what is public is read off a template that never saw the system prompt."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import hf_dp_xattn as dpx

from .calibrations import protect
from .tiny import VOCABULARY, tiny

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "[system]",
    "[user]",
    "[reply]",
    "be",
    "kind",
    "say",
    "the",
    "code",
    "7",
    "hello",
    "who",
    "\n",
]
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[system] {{ m.content | trim }} {% elif m.role == 'user' %}"
    "[user] {{ m.content }} {% else %}[reply] {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[reply]{% endif %}"
)
SYSTEM = {"role": "system", "content": " be kind \n say the code 7\n\n"}
USER = {"role": "user", "content": "hello who"}


def tokenizer(template: str = TEMPLATE) -> Any:
    words = WORDS + [f"w{i}" for i in range(VOCABULARY - len(WORDS))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_special_tokens({"additional_special_tokens": ["[system]", "[user]", "[reply]"]})
    made.chat_template = template
    return made


def words(ids: Any) -> list[str]:
    return [WORDS[i] for i in torch.as_tensor(ids).flatten().tolist()]


def test_the_parts_make_up_the_conversation() -> None:
    made = tokenizer()
    chat = dpx.split_chat(made, [SYSTEM, USER])
    assert words(chat.head) == ["<s>", "[system]"]
    assert words(chat.private) == ["be", "kind", "\n", "say", "the", "code", "7"]
    assert [words(s) for s in chat.segments] == [["be", "kind", "\n"], ["say", "the", "code", "7"]]
    assert words(chat.input_ids) == ["[user]", "hello", "who", "[reply]"]
    whole = made.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert torch.cat([chat.head, chat.private, chat.input_ids[0]]).tolist() == list(whole)
    assert "7" not in repr(chat) and "code" not in repr(chat)


def test_public_parts_do_not_depend_on_the_system_prompt() -> None:
    other = {"role": "system", "content": "hello hello hello"}
    a, b = (dpx.split_chat(tokenizer(), [s, USER]) for s in (SYSTEM, other))
    assert torch.equal(a.head, b.head) and torch.equal(a.input_ids, b.input_ids)


def test_three_lines(private: dpx.DPXAttnConfig) -> None:
    model, made = tiny("llama"), tokenizer()
    protected = protect(model, private.replace(unit="group"))
    chat = dpx.split_chat(made, [SYSTEM, USER])
    release = protected.release(chat.segments, groups="segments", public_head=chat.head)
    out = model.generate(**release.inputs(input_ids=chat.input_ids), max_new_tokens=3)
    assert torch.equal(out[:, : chat.input_ids.shape[1]], chat.input_ids)
    answer = {"role": "assistant", "content": "hello"}
    later = dpx.split_chat(made, [SYSTEM, USER, answer, USER])
    again = protected.release(later.segments, groups="segments", public_head=later.head)
    assert again.contexts[0] is release.contexts[0]
    model.generate(**again.inputs(input_ids=later.input_ids), max_new_tokens=3)
    assert len(protected.report().releases) == 1


def test_ids_of_a_template_are_a_prefix(exact: dpx.DPXAttnConfig) -> None:
    model, made = tiny("llama"), tokenizer()
    handle = dpx.protect(model, exact)
    given = made.apply_chat_template([SYSTEM], return_tensors="pt", return_dict=True)
    n = given["input_ids"].shape[1]
    for context in (given, given["input_ids"], given["input_ids"][0].tolist()):
        release = handle.release(context, public_head=2)
        assert (len(release.contexts[0].public_rows), release.guarantees[0].rows) == (2, n - 2)


@pytest.mark.parametrize(
    ("messages", "template", "error"),
    [
        ([], TEMPLATE, dpx.ConfigError),
        ([USER], TEMPLATE, dpx.ConfigError),
        ([{"role": "system", "content": " "}], TEMPLATE, dpx.ConfigError),
        ([SYSTEM], "<s>[user] hello", dpx.ConfigError),
        ([SYSTEM], "{{ messages[0].content }} {{ messages[0].content }}", dpx.ConfigError),
        ([SYSTEM], "{{ messages[0].content | length }} {{ messages[0].content }}", dpx.ContextError),
        ([SYSTEM], "<s>{{ messages[0].content | upper }}{{ messages[0].content | length }}", dpx.ConfigError),
    ],
    ids=["nothing", "no system", "empty", "left out", "twice", "length", "changed"],
)
def test_what_cannot_be_split(messages: Any, template: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        dpx.split_chat(tokenizer(template), messages)
    assert "kind" not in str(raised.value)


SECOND = {"role": "system", "content": "the code 7"}
DEVELOPER = {"role": "developer", "content": "the code 7"}
CARRIER = "<s>{{ tools }} {{ documents }} {% for m in messages %}[user] {{ m.content }} {% endfor %}"
DECLARED: dict[str, tuple[list[dict[str, str]], dict[str, Any]]] = {
    "second system message": ([SYSTEM, SECOND, USER], {}),
    "after the user's turn": ([SYSTEM, USER, SECOND], {}),
    "developer": ([SYSTEM, DEVELOPER, USER], {}),
    "in capitals": ([SYSTEM, {**SECOND, "role": "System"}, USER], {}),
    "tools": ([SYSTEM, USER], {"tools": [{"name": "code"}]}),
    "documents": ([SYSTEM, USER], {"documents": [{"title": "code", "text": "7"}]}),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_looks_private_beside_the_system_prompt_must_be_declared_public(case: str) -> None:
    """It would stand in the public parts, exact to the model."""
    messages, options = DECLARED[case]
    template = CARRIER if options else TEMPLATE
    with pytest.raises(dpx.ConfigError, match="public_system=True") as raised:
        dpx.split_chat(tokenizer(template), messages, **options)
    assert "7" not in str(raised.value)
    chat = dpx.split_chat(tokenizer(template), messages, public_system=True, **options)
    assert words(chat.private)[:2] == ["be", "kind"] or options
    if not options:
        assert "code" in words(chat.input_ids) and "code" not in words(chat.head)


def test_the_system_message_holds_its_text_only() -> None:
    template = "<s>{{ messages[0].name }} {{ messages[0].content }} [user]"
    with pytest.raises(dpx.ConfigError, match="name") as raised:
        dpx.split_chat(tokenizer(template), [{**SYSTEM, "name": "code"}, USER])
    assert "code" not in str(raised.value)
    assert len(dpx.split_chat(tokenizer(), [{**SYSTEM, "name": None}, USER]).private) == 7


@pytest.mark.parametrize("messages", ["hi", b"hi", SYSTEM, None, ["hi"], [SYSTEM, "hi"], 3], ids=str)
@pytest.mark.parametrize("public", [False, True])
def test_what_is_no_conversation(messages: Any, public: bool) -> None:
    with pytest.raises(dpx.ConfigError, match="list of messages"):
        dpx.split_chat(tokenizer(), messages, public_system=public)


def test_pipelines_need_a_release_too(private: dpx.DPXAttnConfig) -> None:
    text = pipeline("text-generation", model=tiny("llama"), tokenizer=tokenizer())
    with dpx.protect(text, private) as handle:
        with pytest.raises(dpx.ProtectionLostError):
            text("hello who", max_new_tokens=2)
        with handle.public():
            assert text("hello who", max_new_tokens=2)


@pytest.mark.parametrize("separator", "\r\x0b\x0c\x1c\x85\u2028\u2029")
def test_segments_are_cut_at_line_feeds_alone(separator: str) -> None:
    system = {"role": "system", "content": f"be{separator}kind\nsay"}
    assert len(dpx.split_chat(tokenizer(), [system, USER]).segments) == 2


def test_a_byte_order_mark_is_no_part_of_a_system_prompt() -> None:
    plain, marked = ({"role": "system", "content": f"{mark}be kind\n{mark}say"} for mark in ("", "\ufeff"))
    one, other = (dpx.split_chat(tokenizer(), [system, USER]) for system in (plain, marked))
    assert torch.equal(one.private, other.private)


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No: ' + messages[0].content) }}{% endif %}"
)
IN_LAST_TURN = (
    "<s>{% set s = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[user] {% if loop.last %}{{ s }} {% endif %}"
    "{{ m.content }} {% else %}[reply] {{ m.content }} {% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "options"),
    [(REFUSES_SYSTEM, {}), (None, {}), (TEMPLATE, {"tokenize": False}), (TEMPLATE, {"return_dict": True})],
)
def test_templates_that_refuse_or_lack(template: Any, options: dict[str, Any]) -> None:
    with pytest.raises(dpx.ConfigError) as caught:
        dpx.split_chat(tokenizer(template), [SYSTEM, USER], **options)
    assert "kind" not in str(caught.value) and caught.value.__context__ is None


def test_a_system_prompt_in_the_last_turn_makes_one_turn() -> None:
    """Behind it, another head would make another release of the same prompt: a second charge, or a refusal that names no reason."""
    inner = tokenizer(IN_LAST_TURN)
    first = dpx.split_chat(inner, [SYSTEM, USER])
    assert words(first.head) == ["<s>", "[user]"]
    with pytest.raises(dpx.ConfigError, match="template puts the system prompt behind earlier turns"):
        dpx.split_chat(inner, [SYSTEM, USER, {"role": "assistant", "content": "the code"}, USER])


def test_a_head_is_the_same_in_every_turn() -> None:
    later = [USER, {"role": "assistant", "content": "hello"}, USER]
    heads = [dpx.split_chat(tokenizer(), [SYSTEM, *later[:n]]).head for n in (1, 3)]
    assert torch.equal(*heads)


def test_the_private_length_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer()
    made.model_max_length = 8
    made.deprecation_warnings.clear()
    system = {"role": "system", "content": " ".join(["be"] * 101)}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(dpx.split_chat(made, [system, USER]).private) == 101
        assert "101" not in caplog.text and "longer than" not in caplog.text
        made(system["content"])  # what transformers says by itself
        assert "101" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_chat_in_one_call(private: dpx.DPXAttnConfig) -> None:
    model, made = tiny("llama"), tokenizer()
    protected = protect(model, private.replace(unit="group"))
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    reply = protected.chat(made, [SYSTEM, USER], **options)
    parts = dpx.split_chat(made, [SYSTEM, USER])
    release = protected.release(parts.segments, groups="segments", public_head=parts.head)
    assert [entry["charges"] for entry in protected.report().releases] == [1]
    out = model.generate(**release.inputs(input_ids=parts.input_ids), **options)
    assert reply == made.decode(out[0, parts.input_ids.shape[1] :], skip_special_tokens=True) and reply
    answer = {"role": "assistant", "content": "hello"}
    assert protected.chat(made, [SYSTEM, USER, answer, USER], **options)
    assert len(protected.report().releases) == 1
    for bad in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(dpx.ConfigError, match="one reply"):
            protected.chat(made, [SYSTEM, USER], **bad)
