"""`hf-dp-xattn generate`: pictures and texts from a release; nothing of the private text in what is written or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main
from hf_dp_xattn.commands.models import load_plain

from ..hub.hosts import SECRET, files
from ..private_content import PrivateContent, check_clean
from .conftest import chat_tokenizer
from .test_release import KERNEL, prompt  # noqa: F401 (a fixture)

PICTURE = ["--steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def saved(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases of SECRET: plain, bart, llama, chat."""
    root = tmp_path_factory.mktemp("saved")
    (root / "prompt.txt").write_text(SECRET)
    for name in ("plain", "bart", "llama", "chat"):
        start = ["release", str(models_folder / name), "--out", str(root / name), *KERNEL]
        start += ["--chat", "--unit", "group"] if name == "chat" else []
        ledger = str(root / f"{name}.json")
        assert main([*start, "--ledger", ledger, "--prompt-file", str(root / "prompt.txt"), "--json"]) == 0
    return root


def generate(models: Path, name: str, *more: str) -> int:
    return main(["generate", str(models / name), *more])


def test_pictures_from_a_saved_release(models_folder: Path, saved: Path, tmp_path: Path, capfd: Any) -> None:
    start = ["--release", str(saved / "plain"), *PICTURE]
    made = [tmp_path / f"{i}.png" for i in range(3)]
    for file, more in zip(made, ([], [], ["--public", "a dog"]), strict=True):
        assert generate(models_folder, "plain", *start, *more, "--out", str(file)) == 0
    first, again, other = (Image.open(file).tobytes() for file in made)
    assert first == again and first != other
    shown = capfd.readouterr()
    assert "differentially private" in shown.err and "zebra" not in shown.err + shown.out


@pytest.mark.parametrize("name", ["bart", "llama", "chat"])
def test_texts_from_a_saved_release(
    name: str, models_folder: Path, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    start = ["--release", str(saved / name), "--new-tokens", "4"]
    start += ["--public", "quartz zebra"] if name != "bart" else ["--begin", "quartz zebra"]
    start += ["--chat"] if name == "chat" else []
    assert generate(models_folder, name, *start, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["texts"]) == 1 and "differentially private" in values["guarantees"][0]
    file = tmp_path / "text.txt"
    assert generate(models_folder, name, *start, "--out", str(file)) == 0
    assert file.read_text() == values["texts"][0] + "\n"
    capsys.readouterr()
    assert generate(models_folder, name, *start) == 0
    assert capsys.readouterr().out == values["texts"][0] + "\n"


@pytest.mark.parametrize("name", ["bart", "chat"])
def test_a_public_question(name: str, models_folder: Path, saved: Path, capsys: Any) -> None:
    """It reaches the model as its tokenizer and template say: the same text as in Python."""
    model = load_plain(str(models_folder / name), torch.float32)
    release = dpx.Release.from_pretrained(saved / name, host=model)
    tokenizer = chat_tokenizer()
    ids = tokenizer("quartz zebra").input_ids
    if name == "bart":
        given = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *ids]])}
        skip, option = 3, "--begin"
    else:
        given = {"input_ids": torch.tensor([tokenizer("marzipan quartz zebra").input_ids])}
        skip, option = 3, "--public"
    want = model.generate(**release.inputs(**given), max_new_tokens=4)[0, skip:]
    more = ["--chat"] if name == "chat" else []
    start = ["--release", str(saved / name), option, "quartz zebra", "--new-tokens", "4", *more, "--json"]
    assert generate(models_folder, name, *start) == 0
    made = json.loads(capsys.readouterr().out)["texts"]
    assert made == [tokenizer.decode(want, skip_special_tokens=True)]


@pytest.mark.parametrize("model", ["plain", "protected"])
def test_a_private_prompt_is_released_once(
    model: str,
    models_folder: Path,
    prompt: str,  # noqa: F811
    tmp_path: Path,
    capfd: Any,
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    ledger, keep = made / "ledger.json", made / "release"
    start = [
        "--prompt-file",
        prompt,
        "--ledger",
        str(ledger),
        *(KERNEL if model == "plain" else []),
        *PICTURE,
    ]
    assert generate(models_folder, model, *start, "--keep", str(keep), "--out", str(made / "a.png")) == 0
    charged = dpx.Ledger(ledger).entries()
    assert {c.number_of_releases for c in charged} == {1}
    assert generate(models_folder, model, *start, "--out", str(made / "b.png")) == 1
    assert not (made / "b.png").exists() and dpx.Ledger(ledger).entries() == charged
    again = ["--release", str(keep), *PICTURE, "--out", str(made / "b.png")]
    assert generate(models_folder, model, *again) == 0
    assert Image.open(made / "a.png").tobytes() == Image.open(made / "b.png").tobytes()
    shown = capfd.readouterr()
    blobs = {**files(made), "stdout": shown.out.encode(), "stderr": shown.err.encode()}
    check_clean(blobs, PrivateContent(texts=(SECRET,)))


BAD: dict[str, tuple[str, list[str], str]] = {
    "no file": ("plain", [*KERNEL, "--ledger", "l"], "--out"),
    "a text file": ("plain", [*KERNEL, "--ledger", "l", "--out", "a.txt"], "--out"),
    "no folder": ("plain", [*KERNEL, "--ledger", "l", "--out", "nowhere/a.png"], "folder that exists"),
    "a picture's size of a text": ("bart", [*KERNEL, "--ledger", "l", "--height", "8"], "for pictures"),
    "tokens of a picture": ("plain", [*KERNEL, "--ledger", "l", "--new-tokens", "8"], "for texts"),
    "a beginning of a picture": (
        "plain",
        [*KERNEL, "--ledger", "l", "--out", "a.png", "--begin", "a"],
        "encoder-decoder",
    ),
    "a beginning of a chat": (
        "chat",
        [*KERNEL, "--ledger", "l", "--public", "a", "--begin", "a"],
        "encoder-decoder",
    ),
    "a chat of a document": ("bart", [*KERNEL, "--ledger", "l", "--chat"], "decoder-only"),
    "a model that reads images": ("mllama", [*KERNEL, "--ledger", "l"], "image"),
    "nothing to answer": ("llama", [*KERNEL, "--ledger", "l"], "user's turn"),
    "no price": ("plain", ["--ledger", "l", "--out", "a.png"], "--epsilon"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_spends_nothing(
    name: str,
    models_folder: Path,
    prompt: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, more, expected = BAD[name]
    assert generate(models_folder, model, *more, "--prompt-file", prompt) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err and "zebra" not in err
    assert not Path("l").exists() or dpx.Ledger("l").entries() == ()


def test_a_saved_release_takes_no_settings_and_its_own_model_only(
    models_folder: Path, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    out = ["--out", str(tmp_path / "a.png")]
    assert generate(models_folder, "plain", "--release", str(saved / "plain"), *KERNEL, *out) == 2
    assert "leave out --mechanism, --epsilon" in capsys.readouterr().err
    assert generate(models_folder, "bart", "--release", str(saved / "plain")) == 2
    assert generate(models_folder, "plain", "--release", str(saved / "nothing"), *out) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_prompt_among_the_arguments_is_not_repeated(models_folder: Path, capsys: Any) -> None:
    for wrong in ([SECRET], ["--prompt", SECRET]):
        with pytest.raises(SystemExit) as stop:
            generate(models_folder, "plain", "--ledger", "l", "--out", "a.png", *KERNEL, *wrong)
        assert stop.value.code == 2
        assert "zebra" not in "".join(capsys.readouterr())


def test_a_release_for_a_model_without_a_tokenizer_beside_it(models_folder: Path, tmp_path: Path) -> None:
    """As of a GGUF file."""
    model = load_plain(str(models_folder / "chat"), torch.float32)
    words, model.name_or_path = chat_tokenizer(), ""
    public = ["quartz zebra", "wyvern quartz", "zebra wyvern", "quartz"]
    config = dpx.DPXAttnConfig(mechanism="library", epsilon=8.0)
    library = dpx.calibrate(model, public, config, epsilons=8.0, tokenizer=words, progress=False)
    with dpx.protect(model, config, calibration=library, tokenizer=words, ledger=dpx.Ledger()) as handle:
        handle.release("quartz wyvern").save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(dpx.ConfigError, match="no tokenizer beside"):
        dpx.Release.from_pretrained(tmp_path, host=model).inputs(input_ids=ids)
    dpx.unprotect(model)
    release = dpx.Release.from_pretrained(tmp_path, host=model, tokenizer=words)
    assert release.inputs(input_ids=ids)["input_ids"].shape[1] > 2
