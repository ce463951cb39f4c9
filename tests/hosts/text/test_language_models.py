"""Language models that read released text: bare ones, and text-generation pipelines whose system message is private."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TextGenerationPipeline

import hf_dp_xattn as dpx

from ..transformers.decoder_only import tiny as decoder
from ..transformers.encoder_decoder import tiny as seq2seq
from .libraries import LINES, answer_with, config, library
from .words import tokenizer

SECRET = "the number is secret\nspeak french"
OTHER = "say red\nbe open at monday"
QUESTION = {"role": "user", "content": "close at five"}
WORDS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def protect(model: Any, **options: Any) -> Any:
    words = tokenizer()
    made = library(model, LINES, tokenizer=words, grouping="lines")
    return dpx.protect(model, config(), calibration=made, tokenizer=words, **options)


def chat_pipe(kind: str = "llama", template: str | None = None) -> Any:
    words = tokenizer() if template is None else tokenizer(template=template)
    return TextGenerationPipeline(model=decoder.tiny(kind), tokenizer=words)


def protect_chats(pipe: Any, **options: Any) -> Any:
    return dpx.protect(pipe, config(), calibration=library(pipe, LINES, grouping="lines"), **options)


def chat(system: str = SECRET, *later: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, *(later or (QUESTION,))]


def ids(text: str) -> torch.Tensor:
    return torch.tensor([tokenizer()(text, add_special_tokens=False).input_ids])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_a_decoder_reads_the_released_text(kind: str) -> None:
    model, words = decoder.tiny(kind), tokenizer()
    protected = protect(model)
    release = protected.release(SECRET)
    assert (
        len(release.text) == 2
        and set(release.text) <= set(LINES)
        and str(release.text) == "\n".join(release.text)
    )
    inputs = release.inputs(input_ids=ids("close at five"))
    want = torch.cat([ids(str(release.text)), ids("close at five")], 1)
    assert torch.equal(inputs["input_ids"], want)
    found = model.generate(**inputs, **WORDS)
    for more in (
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ):
        assert len(model.generate(**inputs, **{**WORDS, **more})) in (1, 2)
    dpx.unprotect(model)
    assert torch.equal(found, model.generate(want, attention_mask=torch.ones_like(want), **WORDS))
    assert "generate" not in vars(model) and not any(m._forward_pre_hooks for m in model.modules())
    assert words.bos_token_id is not None


def test_batches_heads_and_contexts() -> None:
    model = decoder.tiny("llama")
    protected = protect(model)
    one = protected.release(SECRET)
    users = torch.tensor([[0, 9, 10], [11, 12, 13]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    inputs = one.inputs(input_ids=users, attention_mask=mask, public_head=[1], max_new_tokens=3)
    own = ids(str(one.text))[0].tolist()
    assert inputs.pop("max_new_tokens") == 3
    assert inputs["input_ids"].tolist() == [[0, 1, *own, 9, 10], [1, *own, 11, 12, 13]]
    assert inputs["attention_mask"][0].tolist() == [0] + [1] * (len(own) + 3)
    assert len(model.generate(**inputs, **WORDS)) == 2
    with pytest.raises(dpx.ConfigError, match="3 rows"):
        _two(protected).inputs(input_ids=torch.ones(3, 2, dtype=torch.long))


def _two(protected: Any) -> Any:
    made = [protected.release(t).contexts[0] for t in ("say red", "be open")]
    return dpx.Release(made, protected.config, protected)


def test_units_of_ids_are_their_text() -> None:
    model, words = decoder.tiny("llama"), tokenizer()
    ledger = dpx.Ledger()
    protected = protect(model, ledger=ledger)
    units = [words(t, add_special_tokens=False).input_ids for t in SECRET.split("\n")]
    assert len(protected.release(units).text) == 2
    assert len(protected.release([torch.tensor(u) for u in units]).text) == 2
    assert len(protected.report().releases) == 1
    with pytest.raises(dpx.BudgetExceededError):
        protect(decoder.tiny("gpt2"), ledger=ledger).release(SECRET)
    anchors_like = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", degree=1, projection_dim=4)
    other = dpx.protect(decoder.tiny("llama"), anchors_like, ledger=ledger)
    with pytest.raises(dpx.BudgetExceededError):
        other.release([torch.tensor(u) for u in units], groups="segments", text=SECRET)


def test_nothing_but_released_text_runs() -> None:
    model = decoder.tiny("llama")
    protected = protect(model)
    release = protected.release(SECRET)
    inputs = release.inputs(input_ids=ids("close at five"))
    secret = ids(SECRET)
    shifted = {k: v.roll(1, 1) for k, v in inputs.items()}
    hidden = torch.cat([torch.zeros_like(secret), inputs["input_ids"]], 1)
    masked = {
        "input_ids": torch.cat([secret, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros_like(secret), inputs["attention_mask"]], 1),
    }
    for run in (
        lambda: model.generate(secret, **WORDS),
        lambda: model.generate(torch.cat([secret, inputs["input_ids"]], 1), **WORDS),
        lambda: model.generate(hidden, **WORDS),
        lambda: model.generate(**masked, **WORDS),
        lambda: model.generate(**shifted, **WORDS),
        lambda: model.generate(inputs_embeds=torch.zeros(1, 3, 32), **WORDS),
        lambda: model.generate(**inputs, inputs_embeds=torch.zeros(1, 3, 32), **WORDS),
        lambda: model.generate(**WORDS),
        lambda: model(secret),
        lambda: model(**inputs),
        lambda: model.model(secret),
    ):
        with pytest.raises(dpx.ProtectionLostError):
            run()
    with pytest.raises(dpx.ConfigError, match="generate_batch"):
        model.generate_batch([[1, 2]])
    with protected.public():
        assert model(secret).logits.shape[1] == secret.shape[1] and len(model.generate(secret, **WORDS)) == 1
    assert len(model.generate(**inputs, **WORDS)) == 1
    model._forward_pre_hooks.clear()
    with pytest.raises(dpx.ProtectionLostError, match="gate"):
        model.generate(**inputs, **WORDS)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_reads_the_released_text(kind: str) -> None:
    model, words = seq2seq.tiny(kind), tokenizer()
    protected = protect(model)
    release = protected.release([*SECRET.split("\n")])
    inputs = release.inputs()
    found = model.generate(**inputs, **WORDS)
    longer = release.inputs(prompt="please be polite")
    assert longer["input_ids"].shape[1] == inputs["input_ids"].shape[1] + 3
    model.generate(**longer, **WORDS)
    several = _two(protected).inputs()
    assert len(several["input_ids"]) == 2 and len(model.generate(**several, num_beams=2, **WORDS)) == 2
    private = words(SECRET, return_tensors="pt").input_ids
    for run in (
        lambda: model.generate(private, **WORDS),
        lambda: model.generate(torch.cat([inputs["input_ids"], private], 1), **WORDS),
        lambda: model.get_encoder()(private),
        lambda: model(input_ids=private, decoder_input_ids=private),
    ):
        with pytest.raises(dpx.ProtectionLostError):
            run()
    with pytest.raises(dpx.ConfigError, match="prompt"):
        release.inputs(input_ids=private)
    dpx.unprotect(model)
    want = words(str(release.text), return_tensors="pt").input_ids
    assert torch.equal(found, model.generate(want, **WORDS))


def test_a_system_message_is_swapped_and_charged_once() -> None:
    pipe = chat_pipe()
    protected = protect_chats(pipe)
    first = pipe(chat(), **WORDS)[0]["generated_text"]
    second = pipe(
        chat(SECRET, {"role": "user", "content": "be open"}, {"role": "assistant", "content": "be"}), **WORDS
    )
    text = str(protected.release(SECRET).text)
    assert (
        first[0] == {"role": "system", "content": text} and second[0]["generated_text"][0]["content"] == text
    )
    assert len(protected.report().releases) == 1
    batch = pipe([chat(), chat(OTHER)], **WORDS)
    assert (
        len(batch) == 2 and batch[0][0]["generated_text"] == first and len(protected.report().releases) == 2
    )
    again = pipe(**protected.release(SECRET).inputs(messages=[QUESTION]), **WORDS)
    assert again[0]["generated_text"] == first and len(protected.report().releases) == 2
    inputs = protected.release(SECRET).inputs(input_ids=ids("close at five"))
    assert len(pipe.model.generate(**inputs, **WORDS)) == 1
    dpx.unprotect(pipe)
    assert pipe([{"role": "system", "content": text}, QUESTION], **WORDS)[0]["generated_text"] == first
    assert type(pipe) is TextGenerationPipeline and "generate" not in vars(pipe.model)


def test_no_private_token_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = chat_pipe()
    protected = protect_chats(pipe)
    monkeypatch.setattr(
        type(protected.guard.encode), "__call__", lambda self, texts: torch.zeros(len(texts), 32)
    )
    seen: list[list[int]] = []
    pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].flatten().tolist()), with_kwargs=True
    )
    outputs, inputs = [], []
    for secret in (SECRET, OTHER):
        answer_with(protected, "be blue", "open on monday")
        seen.clear()
        outputs.append(pipe(chat(secret), return_tensors=True, **WORDS))
        inputs.append([list(s) for s in seen])
    assert outputs[0] == outputs[1] and inputs[0] == inputs[1] != []


NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
RAISES = "{{ raise_exception('no system role') }}"


def test_bad_chats_spend_nothing() -> None:
    pipe = chat_pipe()
    protected = protect_chats(pipe)
    system = {"role": "system", "content": "be blue"}
    for bad in (
        "a string",
        ["a string"],
        [],
        [QUESTION],
        chat(""),
        chat("  \n "),
        [{"role": "system", "content": [{"type": "text", "text": SECRET}]}, QUESTION],
        [{**chat()[0], "name": "x"}, QUESTION],
        chat(SECRET, system, QUESTION),
        chat(SECRET, {"role": "developer", "content": "x"}, QUESTION),
        [chat(), [QUESTION]],
        (c for c in [chat()]),
    ):
        with pytest.raises((dpx.ConfigError, dpx.ContextError)) as caught:
            pipe(bad, **WORDS)
        assert "number" not in str(caught.value)
    with pytest.raises(dpx.ConfigError, match="tools"):
        pipe(chat(), tools=[{"name": "secret"}], **WORDS)
    with pytest.raises(dpx.ConfigError, match="documents"):
        pipe(chat(), tokenizer_encode_kwargs={"documents": [{"text": "x"}]}, **WORDS)
    for wrong in (
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"no_such_option": 1},
        {"do_sample": True, "temperature": -1.0},
    ):
        with pytest.raises(Exception, match=r".") as failed:
            pipe(chat(), **{**WORDS, **wrong})
        assert "number" not in str(failed.value).split("got")[0]
    assert not protected.ledger.entries() and not pipe.model._forward_hooks
    assert len(pipe(chat(SECRET, system, QUESTION), public_system=True, **WORDS)) == 1
    assert len(protected.report().releases) == 1
    with protected.public():
        assert len(pipe("be blue", **WORDS)) == 1
    for template in (NO_SYSTEM, RAISES):
        other = chat_pipe(template=template)
        handle = protect_chats(other, ledger=dpx.Ledger())
        with pytest.raises(dpx.ConfigError, match="template"):
            other(chat(), **WORDS)
        assert not handle.ledger.entries()


def test_a_model_is_shared_by_its_pipelines() -> None:
    pipe = chat_pipe()
    protected = protect_chats(pipe)
    other = TextGenerationPipeline(model=pipe.model, tokenizer=pipe.tokenizer)
    with pytest.raises(dpx.ProtectionLostError):
        other(chat(), **WORDS)
    assert dpx.protect(other, config(), calibration=protected.calibration) is protected
    assert other(chat(), **WORDS) == pipe(chat(), **WORDS) and len(protected.report().releases) == 1
    assert dpx.protect(pipe.model, config(), calibration=protected.calibration) is protected
    dpx.unprotect(other)
    assert len(other(chat(), **WORDS)) == 1 and not pipe.model._forward_pre_hooks


def test_what_cannot_be_protected() -> None:
    made = library(decoder.tiny("llama"), LINES, tokenizer=tokenizer())
    for host in (torch.nn.Linear(1, 1), decoder.tiny("llama").model):
        with pytest.raises((dpx.UnsupportedModelError, dpx.ConfigError)):
            dpx.protect(host, config(), calibration=made, tokenizer=tokenizer())
    with pytest.raises(dpx.ConfigError, match="tokenizer"):
        dpx.protect(decoder.tiny("llama"), config(), calibration=made)
    with pytest.raises(dpx.ConfigError, match="library"):
        dpx.protect(decoder.tiny("llama"), config(), tokenizer=tokenizer())
    with pytest.raises(dpx.ConfigError, match="codes"):
        dpx.protect(decoder.tiny("gpt2"), config(), calibration=made, tokenizer=tokenizer())
    with pytest.raises(dpx.ConfigError, match="unit"):
        dpx.protect(decoder.tiny("llama"), config(unit="context"), calibration=made, tokenizer=tokenizer())


def test_a_host_elsewhere_is_given_the_text() -> None:
    model, words = decoder.tiny("llama"), tokenizer()
    made = library(model, LINES, tokenizer=words, grouping="lines")
    protected = dpx.protect(None, config(), calibration=made, encoder=(model, words))
    release = protected.release(SECRET)
    assert (len(release.text) == 2 and "speak" in str(protected.report())) or release.text
    with pytest.raises(dpx.ReleaseError, match="texts"):
        release.inputs()
    with pytest.raises(dpx.BudgetExceededError):
        protected.release(SECRET, fresh=True)


def test_a_whole_context_in_parts_is_charged_once() -> None:
    """All parts by one answer, whatever their number; the same context again costs nothing, and more parts than were planned are served."""
    model, words = decoder.tiny("llama"), tokenizer()
    own = config(unit="context")
    made = dpx.calibrate(
        model,
        ["\n".join(LINES[i : i + 2]) for i in range(len(LINES) - 1)],
        own,
        tokenizer=words,
        grouping="lines",
        epsilons=own.epsilon,
        progress=False,
    )
    assert max(len(j.lists) for j in made.plans[0].joint) == 2
    ledger = dpx.Ledger()
    protected = dpx.protect(None, own, calibration=made, encoder=(model, words), ledger=ledger)
    texts = protected.release(SECRET).texts[0]
    assert len(texts) == len(SECRET.splitlines()) and set(texts) <= set(made.texts)
    assert protected.release(SECRET).texts[0] == texts
    with pytest.raises(dpx.BudgetExceededError):
        protected.release(SECRET, fresh=True)
    longer = "\n".join(f"{line} now" for line in LINES[:3])
    assert len(protected.release(longer).texts[0]) == 3


def test_calibrate_makes_libraries() -> None:
    pipe, words = chat_pipe(), tokenizer()
    options = {"epsilons": 8.0, "progress": False}
    made = dpx.calibrate(pipe, ["please be polite. close at five", "be blue! be open"], config(), **options)
    assert made.grouping == "sentences" and set(made.texts) == {
        "please be polite.",
        "close at five",
        "be blue!",
        "be open",
    }
    units = [[words(t, add_special_tokens=False).input_ids for t in LINES[:3]], [torch.tensor([9, 10])]]
    made = dpx.calibrate(pipe.model, units, config(), tokenizer=words, grouping="segments", **options)
    assert set(LINES[:3]) <= set(made.texts) and made.grouping == "segments"
    for bad in ("one text", [5, 6], [{"a": 1}], [[]], [""]):
        with pytest.raises((dpx.ConfigError, dpx.ContextError)):
            dpx.calibrate(pipe, bad, config(), **options)
    with pytest.raises(dpx.ConfigError, match="cut in"):
        dpx.calibrate(pipe, LINES, config(), grouping="rows", **options)
    with pytest.raises(dpx.ConfigError, match="tokenizer"):
        dpx.calibrate(pipe.model, LINES, config(), **options)
    usual = dpx.calibrate(pipe.model, LINES, tokenizer=words, grouping="lines", **options)
    assert (usual.mechanism, usual.unit) == ("library", "group") and set(usual.texts) <= set(LINES)


def test_a_chat_in_one_call() -> None:
    model, words = decoder.tiny("llama"), tokenizer()
    protected = protect(model)
    reply = protected.chat(words, chat(), **WORDS)
    text = str(protected.release(SECRET).text)
    assert [entry["charges"] for entry in protected.report().releases] == [1]
    assert (
        protected.chat(words, chat(SECRET, QUESTION), **WORDS) == reply and len(protected.host._surfaces) == 2
    )
    dpx.unprotect(model)
    plain = TextGenerationPipeline(model=model, tokenizer=words)(chat(text), **WORDS)
    assert plain[0]["generated_text"][-1]["content"] == reply
    other = seq2seq.tiny("t5")
    with pytest.raises(dpx.ConfigError, match="takes no chat"):
        protect(other, ledger=dpx.Ledger()).chat(words, chat())
