"""Claims about features that are kept: they are the target's own, none is lost or changed unseen, refusals say why."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taps_ext import tiny
from taps_ext.checkpoints.load import TargetEnds, identify, load_target_ends
from taps_ext.training import Example, TokenDataset, features
from taps_ext.training.features import (
    MANIFEST,
    SHARDS,
    DraftBatch,
    FeatureSource,
    FeatureStore,
    FrozenTarget,
    StoredFeatures,
    create_store,
    extract,
    open_store,
    space_for,
)
from taps_ext.training.masks import TokenBatch
from taps_ext.training.recipe import DtypeName

VOCAB, HIDDEN = 47, 24
CPU = torch.device("cpu")
KILLED_IN = ("features.py",)
SHARD_BYTES = 6_000  # some five sequences: several files for a small dataset


def make_model(**overrides: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **overrides})).eval().requires_grad_(False)


def make_data(count: int = 40, seed: int = 0, vocab: int = VOCAB) -> TokenDataset:
    """Sequences of 3 to 24 tokens; fewer of a seed are the first of more."""
    rng = random.Random(seed)
    texts = [rng.choices(range(vocab), k=rng.randint(3, 24)) for _ in range(count)]
    return TokenDataset([Example(tuple(text), (True,) * len(text)) for text in texts])


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return FrozenTarget(make_model())


@pytest.fixture(scope="module")
def data() -> TokenDataset:
    return make_data()


def new_store(folder: Path, target: FrozenTarget, dtype: DtypeName = "bfloat16") -> FeatureStore:
    return create_store(folder, identify(target.model), dtype, SHARD_BYTES)


def filled_store(folder: Path, target: FrozenTarget, *datasets: TokenDataset) -> Path:
    extract(target, datasets, new_store(folder, target))
    return folder


def ends_of(target: FrozenTarget) -> TargetEnds:
    head = target.model.get_output_embeddings().weight
    assert isinstance(head, Tensor)
    return TargetEnds(target.embedding, head, target.model.config, replace(identify(target.model), weights=None))


def stored(folder: Path, target: FrozenTarget) -> StoredFeatures:
    return StoredFeatures(open_store(folder), ends_of(target), CPU)


def rows(data: TokenDataset) -> list[TokenBatch]:
    return [data.batch([index]) for index in range(len(data))]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(SHARDS))


def read_all(source: FeatureSource, data: TokenDataset) -> None:
    for batch in rows(data):
        source.draft_batch(batch)


def assert_holds(folder: Path, target: FrozenTarget, data: TokenDataset) -> None:
    """Every sequence is there, as the target computes it now."""
    source = stored(folder, target)
    for batch in rows(data):
        expected = target.draft_batch(batch).features
        torch.testing.assert_close(source.draft_batch(batch).features, expected, rtol=2**-7, atol=1e-5)


def assert_equal(a: DraftBatch, b: DraftBatch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, Tensor):  # the last bits of a forward depend on the shape of its batch
            torch.testing.assert_close(value, other, rtol=2**-7, atol=1e-5)
        else:
            assert value == other, name


def in_process(function: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A forked process: it has what this one has imported, so it starts in milliseconds."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def survives(num_lines: int, function: Callable[[], object]) -> bool:
    """Whether a process did all of it before it was killed (-9) at its n-th line in the code of the store."""

    def run() -> None:
        left = num_lines

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if Path(frame.f_code.co_filename).name not in KILLED_IN:
                return None
            left -= event == "line"
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        function()

    process = in_process(run)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def finish(*processes: multiprocessing.process.BaseProcess) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_batches_are_the_online_ones_rounded_to_the_dtype_of_the_store(
    dtype: DtypeName, target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    store = new_store(tmp_path / "store", target, dtype)
    assert extract(target, [data], store) == len(data)
    target.model.save_pretrained(tmp_path / "target")
    source = StoredFeatures(open_store(tmp_path / "store"), load_target_ends(tmp_path / "target"), CPU)
    round_ = getattr(torch, dtype)
    for batch in rows(data):
        online = target.draft_batch(batch)
        features, next_features = (value.to(round_).float() for value in (online.features, online.next_features))
        assert_equal(source.draft_batch(batch), replace(online, features=features, next_features=next_features))
        assert torch.equal(source.logits(features), target.logits(features))
    assert torch.equal(source.embedding, target.embedding)


def test_features_of_the_shipped_target_need_only_its_two_ends(tmp_path: Path) -> None:
    model, _ = tiny.load_target()
    online, data = FrozenTarget(model.requires_grad_(False)), make_data(12, vocab=model.config.vocab_size)
    extract(online, [data], create_store(tmp_path, identify(model), "float32"))
    source = StoredFeatures(open_store(tmp_path), load_target_ends(tiny.assets() / "target"), CPU)
    for batch in rows(data):
        assert_equal(source.draft_batch(batch), online.draft_batch(batch))


def test_a_batch_of_several_rows_is_its_rows_with_zeros_as_padding(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    source = stored(filled_store(tmp_path, target, data), target)
    batch = source.draft_batch(data.batch([3, 1, 4, 15, 9]))
    for row, index in enumerate((3, 1, 4, 15, 9)):
        alone, length = source.draft_batch(data.batch([index])), data.length(index) - 1
        for name in ("features", "next_features", "next_embeddings", "loss_mask"):
            assert torch.equal(getattr(batch, name)[row, :length], getattr(alone, name)[0])
        assert not batch.next_features[row, length:].any()
    assert batch.features.dtype == torch.float32


def test_a_file_of_a_store_is_plain_safetensors(target: FrozenTarget, data: TokenDataset, tmp_path: Path) -> None:
    filled_store(tmp_path, target, data)
    files = [load_file(path) for path in shards(tmp_path)]
    assert len(files) > 3
    for tensors in files:
        num_positions = int(tensors["lengths"].sum())
        assert tensors["features"].dtype == torch.bfloat16 and tensors["features"].shape == (num_positions, HIDDEN)
    ids = torch.cat([tensors["ids"] for tensors in files]).tolist()
    assert sorted(id % 2**64 for id in ids) == sorted(data.ids)


def test_the_space_that_is_announced_is_what_the_files_take(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    store = new_store(tmp_path, target)
    extract(target, [make_data(10)], store)  # the first ten are there already
    before = sum(path.stat().st_size for path in shards(tmp_path))
    space = space_for(store, [data, data])
    assert space.num_sequences == len(data) - 10
    assert space.num_tokens == sum(data.length(i) for i in range(10, len(data)))
    extract(target, [data, data], store)
    taken = sum(path.stat().st_size for path in shards(tmp_path)) - before
    assert 0 < taken - space.num_bytes < 1000 * len(shards(tmp_path)) + 24 * len(data)
    assert space_for(store, [data]).num_bytes == 0


def test_nothing_is_computed_when_the_disk_is_too_small(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path, target)
    needed = space_for(store, [data]).num_bytes
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(
        OSError, match=rf"of 40 sequences \({data.num_tokens} tokens x 48 bytes\) take .* are free; give"
    ):
        extract(target, [data], store)
    assert not shards(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    extract(target, [data], store)


def test_features_that_are_not_finite_are_refused(target: FrozenTarget, tmp_path: Path) -> None:
    store = new_store(tmp_path, target, "float16")
    with pytest.raises(ValueError, match="not finite in float16; use bfloat16"):
        store.add(1, torch.full((3, HIDDEN), 1e6))
    store.flush()
    assert not shards(tmp_path)


def test_the_first_features_of_a_text_stay_whatever_becomes_of_their_tensor(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    store, batch = new_store(tmp_path, target, "float32"), data.batch([0])
    first = torch.ones(data.length(0), HIDDEN)
    store.add(data.ids[0], first)
    first.zero_()
    for _ in range(2):
        store.add(data.ids[0], first)
        store.flush()
        assert bool((store.read(batch, CPU) == 1).all())
    assert len(shards(tmp_path)) == 1


# --- kills, full disks, missing files --------------------------------------------------------------------------------


def test_an_extraction_that_is_killed_goes_on_and_ends_whole(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    rng, counts = random.Random(0), [0]
    while not survives(rng.randrange(100, 1000), lambda: extract(target, [data], new_store(tmp_path, target))):
        counts.append(len(new_store(tmp_path, target)))
    assert counts == sorted(counts) and sum(0 < count < len(data) for count in counts) >= 1, "killed in the middle"
    ids = [id for path in shards(tmp_path) for id in load_file(path)["ids"].tolist()]
    assert sorted(id % 2**64 for id in ids) == sorted(data.ids), "every sequence once"
    assert_holds(tmp_path, target, data)


def test_what_a_killed_process_was_writing_is_ignored_and_then_removed(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    fresh, old = (tmp_path / f".{shards(tmp_path)[0].name}.{name}.tmp" for name in ("fresh", "old"))
    for path in (fresh, old):
        path.write_bytes(shards(tmp_path)[0].read_bytes()[:100])
    os.utime(old, (0, time.time() - 2 * features.ABANDONED_S))
    open_store(tmp_path).require([data])
    assert old.exists(), "a reader removes nothing"
    new_store(tmp_path, target)
    assert fresh.exists() and not old.exists(), "a fresh one may be of a process that lives"


@pytest.mark.parametrize("divided", [True, False], ids=["shares", "the same work twice"])
def test_processes_that_write_at_once_do_each_other_no_harm(
    divided: bool, target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    def work(index: int) -> None:
        share = {"process_index": index, "num_processes": 3} if divided else {}
        extract(target, [data], new_store(tmp_path, target), report=lambda *_: time.sleep(0.002), **share)

    finish(*(in_process(partial(work, index)) for index in range(3)))
    ids = [id % 2**64 for path in shards(tmp_path) for id in load_file(path)["ids"].tolist()]
    assert sorted(ids) == sorted(data.ids) if divided else set(ids) == set(data.ids)
    assert_holds(tmp_path, target, data)


def test_a_full_disk_is_one_sentence_and_what_was_stored_stays(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FORWARD_TOKENS", 1)

    def fill() -> None:
        def report(done: int, total: int) -> None:
            if done > total / 2:  # from here on no file may be longer than a file of the store is
                resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, resource.RLIM_INFINITY))

        with pytest.raises(
            OSError, match=r"^[\d.]+ [GM]iB of features could not .* \(File too large\); free some space"
        ):
            extract(target, [data], new_store(tmp_path, target), report=report)

    finish(in_process(fill))
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    store = new_store(tmp_path, target)
    num_kept = len(store)
    assert 0 < num_kept < len(data)
    assert extract(target, [data], store) == len(data) - num_kept
    assert_holds(tmp_path, target, data)


def test_a_missing_file_is_counted_and_only_it_is_computed_again(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    lost = shards(tmp_path)[2]
    num_lost = len(load_file(lost)["ids"])
    lost.unlink()
    with pytest.raises(
        ValueError, match=f"^{num_lost} of 40 sequences have no features in .*; run `taps-ext features`"
    ):
        open_store(tmp_path).require([data])
    with pytest.raises(ValueError, match=r"has no features of sequence [0-9a-f]{16}; run"):
        read_all(stored(tmp_path, target), data)
    assert extract(target, [data], new_store(tmp_path, target)) == num_lost
    assert_holds(tmp_path, target, data)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_is_noticed_when_the_store_is_opened(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    path = shards(tmp_path)[3]
    content, rng = path.read_bytes(), random.Random(1)
    lengths = [0, 1, 7, 8, 9, len(content) - 1, *(rng.randrange(len(content)) for _ in range(30))]
    for changed in [content[:length] for length in lengths]:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged; delete it and run `taps-ext features`"):
            open_store(tmp_path)
    path.unlink()
    extract(target, [data], new_store(tmp_path, target))
    assert_holds(tmp_path, target, data)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "3", '{"format": 2}', {"target": 3}, {"target": {}}, {"dtype": "x"}]
)
def test_a_damaged_manifest_is_named(
    content: str | dict[str, Any], target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((tmp_path / MANIFEST).read_text()), **content})
    (tmp_path / MANIFEST).write_text(content)
    for open_ in (lambda: open_store(tmp_path), lambda: new_store(tmp_path, target)):
        with pytest.raises(ValueError, match=rf"{MANIFEST} is damaged; delete"):
            open_()


# --- stores of something else ----------------------------------------------------------------------------------------


def changed_model(part: str) -> FrozenTarget:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(part)[-1].neg_()
    return FrozenTarget(model)


@pytest.mark.parametrize(
    "part", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"]
)
def test_features_of_another_target_are_refused(
    part: str, target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    other = changed_model(part)
    with pytest.raises(ValueError, match=rf"{tmp_path} holds features of the target .* other weights; give another"):
        new_store(tmp_path, other)
    if part.startswith(("model.embed", "lm_head")):  # all that is known of a target that is not loaded
        with pytest.raises(ValueError, match="holds features of the target"):
            stored(tmp_path, other)


def test_a_target_is_the_same_under_another_name_and_in_another_dtype() -> None:
    known = identify(make_model())
    for dtype in (torch.bfloat16, torch.float16):
        other = identify(make_model().to(dtype))
        other.check_same(replace(known, name="elsewhere"), Path())
    for differs in ({"rope_theta": 5e5}, {"num_hidden_layers": 3}, {"hidden_size": 32}):
        with pytest.raises(ValueError, match="other weights"):
            identify(make_model(**differs)).check_same(known, Path())
    fewer_layers = make_model()
    fewer_layers.config.num_hidden_layers = 1
    assert identify(fewer_layers).ends != known.ends


def test_a_store_of_another_kind_is_refused_in_a_sentence(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    folder = filled_store(tmp_path / "store", target, data)
    with pytest.raises(ValueError, match=r"holds bfloat16 features, not float32; set features.dtype to bfloat16"):
        new_store(folder, target, "float32")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(ValueError, match=r"is a feature store of another version; give another features.path"):
        open_store(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no features in {folder}: there is no {MANIFEST}; run `taps-ext"):
        open_store(folder)


# --- the two ends of a target ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin", "bare names"])
def test_the_ends_are_found_in_every_form_of_a_target(form: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=tied)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if not (tied and "lm_head" in name)}
    model.save_pretrained(tmp_path, max_shard_size="4KB" if "sharded" in form else "1GB")
    if form.endswith("bin"):
        for path in tmp_path.glob("*.safetensors*"):
            path.unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    if form == "sharded bin":
        (tmp_path / "pytorch_model.bin").unlink()
        files = {name: f"pytorch_model-{number:05d}.bin" for number, name in enumerate(tensors)}
        for name, file in files.items():
            torch.save({name: tensors[name]}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    if form == "bare names":
        from safetensors.torch import save_file

        save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    ends = load_target_ends(tmp_path)
    assert torch.equal(ends.embedding, model.get_input_embeddings().weight)
    assert torch.equal(ends.head, model.get_output_embeddings().weight)
    assert (ends.head is ends.embedding) == tied
    assert ends.identity == replace(identify(model), name=str(tmp_path), weights=None)


def test_only_the_files_of_the_two_ends_are_read(tmp_path: Path) -> None:
    """So a target that fits no memory is trained for."""
    make_model().save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {index["model.embed_tokens.weight"], index["lm_head.weight"]}
    others = set(index.values()) - kept
    assert len(others) > 2
    for name in others:
        (tmp_path / name).unlink()
    load_target_ends(tmp_path)
    (tmp_path / kept.pop()).write_bytes(b"12345678{}")
    with pytest.raises(ValueError, match=r"safetensors cannot be read as tensors"):
        load_target_ends(tmp_path)


def test_a_target_without_its_ends_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no target at {tmp_path}: it is neither a directory .* nor a hub id"):
        load_target_ends(tmp_path)
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights in {tmp_path}: none of model.safetensors"):
        load_target_ends(tmp_path)
    weights.pop("lm_head.weight")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold one tensor named ...lm_head.weight or .*, got none"):
        load_target_ends(tmp_path)


def test_what_waits_for_long_is_written_before_its_file_is_full(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path, identify(target.model), "bfloat16")
    store.add(1, torch.ones(3, HIDDEN))
    assert not shards(tmp_path)
    monkeypatch.setattr(features, "LONGEST_WAIT_S", 0.0)
    store.add(2, torch.ones(3, HIDDEN))
    assert len(shards(tmp_path)) == 1 and len(open_store(tmp_path)) == 2
