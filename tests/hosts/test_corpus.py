"""A corpus as a stream, in one process and in several: the release of the list, bit for bit, however it is sharded."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.ranks import LIMIT, Ranks, require_room

from ..hosts_tiny import tiny_sd
from ..mechanisms.library.worlds import contexts, encode
from .transformers.encoder_decoder.calibrations import calibration_for
from .transformers.encoder_decoder.tiny import tiny

fork = multiprocessing.get_context("fork")
GROUPS = dpx.DPXAttnConfig(mechanism="library", unit="group", epsilon=1.0)
SUMS = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", epsilon=4.0)


@pytest.fixture(scope="module")
def library() -> dpx.TextLibrary:
    options = LibraryOptions(
        epsilons=(1.0,), encoder="toy", progress=False, held_out=0.4, grouping="documents"
    )
    return build_library(contexts(count=120, length=5), encode, GROUPS, options)


def texts(count: int = 200) -> list[str]:
    return [f"private rule {i} of {'tea' if i % 4 else 'war'}" for i in range(count)]


def voting(library: dpx.TextLibrary, ledger: dpx.Ledger, **options: Any) -> Any:
    options.setdefault("entropy", SeededEntropy(5))
    return dpx.protect(None, GROUPS, calibration=library, encoder=encode, ledger=ledger, **options)


def told(release: Any) -> list[tuple[str, int]]:
    return list(zip(release.text, release.counts, strict=True))


# --- one process


@pytest.mark.parametrize("kind", ("dataset", "column", "iterable dataset", "rows with a text"))
def test_a_stream_of_texts_is_released_as_their_list(library: dpx.TextLibrary, kind: str) -> None:
    expected = told(voting(library, dpx.Ledger()).release(texts()))
    data = datasets.Dataset.from_dict({"text": texts(), "source": ["a"] * 200, "number": list(range(200))})
    corpus = {
        "dataset": data.select_columns(["text"]),
        "column": data["text"],
        "iterable dataset": data.to_iterable_dataset(num_shards=3),
        "rows with a text": data,
    }[kind]
    ledger = dpx.Ledger()
    handle = voting(library, ledger)
    release = handle.release(corpus, groups="documents")
    assert told(release) == expected
    assert len(ledger.entries()) == 200  # each document, once
    assert (
        handle.release(corpus, groups="documents").counts == release.counts and len(ledger.entries()) == 200
    )
    assert handle.report().to_dict()["releases"][0]["counts"] == list(release.counts)


def test_an_iterator_is_read_once_and_votes_if_it_is_long(library: dpx.TextLibrary) -> None:
    ledger = dpx.Ledger()
    assert told(voting(library, ledger).release(iter(texts()), groups="documents")) == told(
        voting(library, dpx.Ledger()).release(texts())
    )
    assert len(ledger.entries()) == 200
    with pytest.raises(dpx.ConfigError, match="pass a list"):
        voting(library, ledger := dpx.Ledger()).release(iter(texts(2)), groups="documents")
    assert not ledger.entries()


def test_budgets_meet_those_of_lists(library: dpx.TextLibrary) -> None:
    """A document has one budget, in whatever form its corpora come."""
    ledger = dpx.Ledger()
    voting(library, ledger).release(texts(100))
    with pytest.raises(dpx.BudgetExceededError):
        voting(library, ledger).release(iter(texts(120)[90:] + texts(300)[200:]), groups="documents")
    before = len(ledger.entries())
    voting(library, ledger).release(iter(texts(300)[100:]), groups="documents")
    assert len(ledger.entries()) == before + 200


def test_a_document_has_one_budget_on_a_pipeline_too(library: dpx.TextLibrary) -> None:
    """As a list, a stream, a reversed list or a growing one."""
    documents = texts()
    whole = {"groups": "documents"}
    for first, second in ((list, iter), (iter, list), (list, reversed)):
        ledger = dpx.Ledger()
        handle = dpx.protect(tiny_sd(), GROUPS, calibration=library, encoder=encode, ledger=ledger)
        handle.release(first(documents), **whole)
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(second(documents) if second is iter else list(second(documents)), **whole)


def test_the_number_of_documents_is_in_no_note_where_it_is_private(library: dpx.TextLibrary) -> None:
    for relation, note in (("replace_one", {"documents": 200}), ("add_or_remove_one", {})):
        config, ledger = GROUPS.replace(neighboring=relation), dpx.Ledger()
        handle = dpx.protect(None, config, calibration=library, encoder=encode, ledger=ledger)
        handle.release(iter(texts()), groups="documents")
        assert dict(ledger.entries()[0].note) == note


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of different lengths, no two of them alike."""
    generator = random.Random(seed)
    made = [
        [generator.randrange(4, 50) for _ in range(generator.randrange(3, 9))] + [4 + i % 40]
        for i in range(count)
    ]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in made]


def batch(documents: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(d["input_ids"]) for d in documents)
    ids = torch.tensor([d["input_ids"] + [1] * (longest - len(d["input_ids"])) for d in documents])
    mask = torch.tensor([d["attention_mask"] + [0] * (longest - len(d["input_ids"])) for d in documents])
    return {"input_ids": ids, "attention_mask": mask}


def bits(release: Any) -> list[torch.Tensor]:
    return [t for s in release.contexts[0].structures for t in s.tensors().values()]


def test_documents_of_an_encoder_decoder_are_released_as_their_batch() -> None:
    """Sums over 150 documents, read 64 at a time."""
    model, documents = tiny("bart"), rows(150)
    with dpx.protect(model, SUMS, ledger=dpx.Ledger(), entropy=SeededEntropy(3)) as handle:
        expected = bits(handle.release(groups="documents", **batch(documents)))
    ledger = dpx.Ledger()
    with dpx.protect(model, SUMS, ledger=ledger, entropy=SeededEntropy(3)) as handle:
        release = handle.release(datasets.Dataset.from_list(documents), groups="documents")
        assert all(map(torch.equal, bits(release), expected)) and len(expected) > 1
        out = model.generate(**release.inputs(), max_new_tokens=3)
        assert out.shape[0] == 1
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(iter(documents[:3]), groups="documents")
        data = datasets.Dataset.from_list(documents)
        assert handle.release(data, groups="documents").contexts == release.contexts  # found again
        with torch.no_grad():  # another encoder gives other rows: no stale release
            model.get_encoder().layers[0].fc1.weight.mul_(1.5)
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(data, groups="documents")


def test_a_release_as_a_dataset(library: dpx.TextLibrary, tmp_path: Path) -> None:
    release = voting(library, dpx.Ledger()).release(texts())
    plain = release.to_dataset()
    assert plain["text"][:] == list(release.text) and plain["count"][:] == list(release.counts)
    release.to_dataset(encode).save_to_disk(tmp_path / "corpus")
    corpus = datasets.load_from_disk(tmp_path / "corpus")
    assert torch.equal(torch.tensor(corpus["embedding"][:]), encode(list(release.text)))
    corpus.add_faiss_index("embedding")
    _, found = corpus.get_nearest_examples("embedding", encode(["all of tea"]).numpy()[0], k=2)
    assert all("tea" in text for text in found["text"])
    with pytest.raises(dpx.ConfigError, match="finite numbers"):
        release.to_dataset(lambda texts: torch.zeros(1, 3))


# --- several processes


def _work(rank: int, world: int, folder: Path, run: Any, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    try:
        found = run(rank)
    except Exception as error:
        found = error
    results.put((rank, found))
    results.close()
    results.join_thread()
    os._exit(0)


def together(world: int, folder: Path, run: Any) -> dict[int, Any]:
    """What `run(rank)` gives in each of so many processes; nothing of one that dies."""
    folder.mkdir(parents=True)
    results = fork.Queue()
    workers = [fork.Process(target=_work, args=(rank, world, folder, run, results)) for rank in range(world)]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    while len(found) < sum(w.exitcode is None or w.exitcode == 0 for w in workers):
        with contextlib.suppress(Exception):
            rank, value = results.get(timeout=0.2)
            found[rank] = value
    for worker in workers:
        worker.join(30)
    return found


SHARDINGS = {
    "one": [range(200)],
    "two": [range(100), range(100, 200)],
    "two, uneven and reordered": [range(199, 20, -1), range(21)],
    "three, one of them empty": [range(0, 200, 2), range(0), range(1, 200, 2)],
    "four, the first empty": [range(0), range(150), range(150, 151), range(151, 200)],
}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("once", (False, True), ids=("dataset", "iterator"))
def test_texts_are_released_alike_however_they_are_sharded(
    library: dpx.TextLibrary, tmp_path: Path, sharding: str, once: bool
) -> None:
    shards, path = SHARDINGS[sharding], tmp_path / "ledger.json"
    expected = told(voting(library, dpx.Ledger()).release(texts()))

    def run(rank: int) -> Any:
        # the seeds of others than the first play no part
        handle = voting(
            library,
            dpx.Ledger(path if rank == 0 else None),
            entropy=SeededEntropy(5 if rank == 0 else 50 + rank),
        )
        mine = [texts()[i] for i in shards[rank]]
        corpus = iter(mine) if once else datasets.Dataset.from_dict({"text": mine})
        return told(handle.release(corpus, groups="documents"))

    found = together(len(shards), tmp_path / "job", run)
    assert found == dict.fromkeys(range(len(shards)), expected)
    assert len(dpx.Ledger(path).entries()) == 200


@pytest.mark.parametrize("world", (2, 3))
def test_anchors_of_an_encoder_decoder_are_released_alike_however_they_are_sharded(
    tmp_path: Path, world: int
) -> None:
    """Rows, each counted in its public cell."""
    model, documents = tiny("bart"), rows(20)
    calibration = dataclasses.replace(calibration_for(model), unit="group", grouping="documents")
    config = dpx.DPXAttnConfig(mechanism="anchors", unit="group", epsilon=8.0)
    options = {"calibration": calibration, "allow_useless": True}

    def told_rows(release: Any) -> list[Any]:
        context = release.contexts[0].context
        return [context.rows.tolist(), context.log_weights.tolist()]

    with dpx.protect(model, config, ledger=dpx.Ledger(), entropy=SeededEntropy(3), **options) as handle:
        expected = told_rows(handle.release(groups="documents", **batch(documents)))

    def run(rank: int) -> Any:
        with dpx.protect(model, config, ledger=dpx.Ledger(), entropy=SeededEntropy(3), **options) as handle:
            return told_rows(handle.release(iter(documents[rank::world]), groups="documents"))

    assert together(world, tmp_path / "job", run) == dict.fromkeys(range(world), expected)


@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_sums_of_an_encoder_decoder_are_released_alike_however_they_are_sharded(
    tmp_path: Path, world: int
) -> None:
    model, documents = tiny("bart"), rows(20)
    with dpx.protect(model, SUMS, ledger=dpx.Ledger(), entropy=SeededEntropy(3)) as handle:
        expected = [t.tolist() for t in bits(handle.release(groups="documents", **batch(documents)))]

    def run(rank: int) -> Any:
        with dpx.protect(model, SUMS, ledger=dpx.Ledger(), entropy=SeededEntropy(3)) as handle:
            release = handle.release(datasets.Dataset.from_list(documents[rank::world]), groups="documents")
            return [t.tolist() for t in bits(release)]

    assert together(world, tmp_path / "job", run) == dict.fromkeys(range(world), expected)


def test_the_comparison_catches_a_shard_that_is_left_out(
    library: dpx.TextLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power: without the sum over processes the bits differ."""
    expected = told(voting(library, dpx.Ledger()).release(texts()))
    monkeypatch.setattr(Ranks, "total", lambda self, integers: tuple(integers))

    def run(rank: int) -> Any:
        return told(voting(library, dpx.Ledger()).release(iter(texts()[rank::2]), groups="documents"))

    assert together(2, tmp_path / "job", run)[0] != expected


@pytest.mark.parametrize("world", (2, 3))
def test_a_library_is_the_same_however_many_processes_encode_it(tmp_path: Path, world: int) -> None:
    public, encoded = contexts(count=120, length=5), multiprocessing.get_context("fork").Value("i", 0)

    def counted(texts: list[str]) -> torch.Tensor:
        with encoded.get_lock():
            encoded.value += len(texts)
        return encode(texts)

    def made(processes: bool) -> Any:
        options = {"grouping": "documents", "epsilons": 1.0, "progress": False, "encoder": counted}
        return dpx.calibrate(None, public, GROUPS, processes=processes, **options)

    alone = made(False)
    before, encoded.value = encoded.value, 0

    def run(rank: int) -> Any:
        library = made(True)
        return [t.tolist() for t in (library.codes, library.plans[0].entries)], library.votes[
            0
        ].entries.tolist()

    expected = [t.tolist() for t in (alone.codes, alone.plans[0].entries)], alone.votes[0].entries.tolist()
    found = together(world, tmp_path / "job", run)
    assert found == dict.fromkeys(range(world), expected)
    assert encoded.value < 1.9 * before  # not once for each process, but for some probes


def test_a_document_in_two_shards_is_refused(library: dpx.TextLibrary, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"

    def run(rank: int) -> Any:
        handle = voting(library, dpx.Ledger(path if rank == 0 else None))
        return handle.release(iter(texts()), groups="documents")  # the whole corpus, in each

    found = together(2, tmp_path / "job", run)
    assert all(isinstance(e, dpx.DPXAttnError) and "split_dataset_by_node" in str(e) for e in found.values())
    assert len(found) == 2 and not dpx.Ledger(path).entries()


def test_other_configs_and_a_document_that_fails_stop_all(library: dpx.TextLibrary, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"

    def other(rank: int) -> Any:
        config = GROUPS.replace(epsilon=1.0 + rank)
        handle = dpx.protect(
            None, config, calibration=library, encoder=encode, ledger=dpx.Ledger(path if rank == 0 else None)
        )
        return handle.release(iter(texts()[rank::2]), groups="documents")

    def empty(rank: int) -> Any:
        handle = voting(library, dpx.Ledger(path if rank == 0 else None))
        return handle.release(iter([*texts()[rank::2], *([" "] if rank else [])]), groups="documents")

    def none(rank: int) -> Any:
        return voting(library, dpx.Ledger(path if rank == 0 else None)).release(iter([]), groups="documents")

    for i, (run, words) in enumerate(
        ((other, "different configs"), (empty, "not empty"), (none, "no documents"))
    ):
        found = together(2, tmp_path / str(i), run)
        assert len(found) == 2 and all(
            isinstance(e, dpx.DPXAttnError) and words in str(e) for e in found.values()
        ), found
    assert not dpx.Ledger(path).entries()


@pytest.mark.parametrize("dies", ("second, reading", "first, reading", "second, charged", "first, charged"))
def test_a_process_that_dies_leaves_a_charge_that_is_said_or_none(
    library: dpx.TextLibrary, tmp_path: Path, dies: str
) -> None:
    path, (who, when) = tmp_path / "ledger.json", dies.split(", ")

    def run(rank: int) -> Any:
        import hf_dp_xattn.hosts.corpus as corpus

        handle, victim = (
            voting(library, dpx.Ledger(path if rank == 0 else None)),
            rank == ("first", "second").index(who),
        )

        def read() -> Any:
            for i, text in enumerate(texts()[rank::2]):
                if victim and when == "reading" and i == 90:
                    os._exit(9)
                yield text

        if victim and when == "charged":
            real = corpus.SystemEntropy if who == "first" else Ranks.share
            if who == "first":
                handle.releases.cache.put = lambda *a: os._exit(9)
            else:
                calls: list[int] = []

                def share(self: Ranks, value: Any) -> Any:
                    calls.append(1)
                    if len(calls) == 3:  # key of the ledger, key of the corpus, then the release
                        os._exit(9)
                    return real(self, value)

                Ranks.share = share  # type: ignore[method-assign]
        return handle.release(read(), groups="documents")

    found = together(2, tmp_path / "job", run)
    (left,) = found.values()
    charged = len(dpx.Ledger(path).entries())
    if when == "reading":
        assert isinstance(left, dpx.ReleaseError) and "Nothing was spent" in str(left) and not charged
    elif isinstance(left, dpx.ReleaseError):
        assert "may have been charged" in str(left) and charged == 200
    else:
        assert charged == 200  # the first process has its release, whole


def test_sums_that_may_not_fit_are_refused() -> None:
    require_room(LIMIT - 1)
    with pytest.raises(dpx.ReleaseError, match="64 bits"):
        require_room(LIMIT)
    assert Ranks().total((torch.tensor([3, -4]),))[0].tolist() == [3, -4]
    with pytest.raises(dpx.ReleaseError, match="64 bits"):
        Ranks().total((torch.tensor([-LIMIT]),))


def test_what_is_no_corpus_is_refused(library: dpx.TextLibrary) -> None:
    handle = voting(library, ledger := dpx.Ledger())
    with pytest.raises(dpx.ConfigError, match='groups="documents"'):
        handle.release(iter(texts()))
    with pytest.raises(dpx.ConfigError, match="select_columns"):
        handle.release(datasets.Dataset.from_dict({"a": texts(), "b": texts()}), groups="documents")
    with pytest.raises(dpx.ContextError, match="not empty"):
        handle.release(iter([*texts(), ""]), groups="documents")
    with pytest.raises(dpx.ContextError, match="a list of strings"):
        handle.release(
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts()})}), groups="documents"
        )
    changing = datasets.Dataset.from_dict({"text": texts()}).to_iterable_dataset()
    seen: list[int] = []

    def other(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(1)
        return {"text": row["text"] + str(len(seen))}

    with pytest.raises(dpx.ContextError, match="must stay as it is"):
        handle.release(changing.map(other), groups="documents")
    row = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row")
    with (
        dpx.protect(tiny("bart"), row, ledger=ledger) as model,
        pytest.raises(dpx.ConfigError, match="unit='group'"),
    ):
        model.release(iter(rows(3)), groups="documents")
    assert not ledger.entries()
