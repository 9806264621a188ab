"""Claims about features that are kept: they are the target's own, none is lost or changed unseen, refusals say why."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
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
from taps_ext.training import Example, TokenDataset, feature_shards, feature_sources, feature_store
from taps_ext.training.config import DtypeName
from taps_ext.training.dataset import BatchOrder, TokenBatch
from taps_ext.training.feature_shards import SHARDS
from taps_ext.training.feature_sources import CachedFeatures, StoredFeatures, extract
from taps_ext.training.feature_store import MANIFEST, FeatureStore, create_store, open_store
from taps_ext.training.features import DraftBatch, FeatureSource, FrozenTarget

VOCAB, HIDDEN = 47, 24
CPU = torch.device("cpu")
KILLED_IN = ("feature_shards.py", "feature_sources.py", "feature_store.py")
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
        expected = target.draft_batch(batch).features.bfloat16().float()
        assert torch.equal(source.draft_batch(batch).features, expected)


def assert_equal(a: DraftBatch, b: DraftBatch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


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


def test_on_the_cpu_features_are_a_function_of_the_text_alone(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    """Whoever computes a text, beside whatever else: so it does not matter what a killed run had stored."""
    other = make_data(30, seed=5)
    mixed = TokenDataset([(other if i % 2 else data)[i] for i in range(30)])
    for name, datasets in (("alone", [data]), ("after", [other, mixed, data])):
        extract(target, datasets, new_store(tmp_path / name, target, "float32"))
    alone, after = stored(tmp_path / "alone", target), stored(tmp_path / "after", target)
    for batch in rows(data):
        assert_equal(alone.draft_batch(batch), after.draft_batch(batch))


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
    space = store.space_for([data, data])
    assert space.num_sequences == len(data) - 10
    assert space.num_tokens == sum(data.length(i) for i in range(10, len(data)))
    extract(target, [data, data], store)
    taken = sum(path.stat().st_size for path in shards(tmp_path)) - before
    assert 0 < taken - space.num_bytes < 1000 * len(shards(tmp_path)) + 24 * len(data)
    assert store.space_for([data]).num_bytes == 0


def test_nothing_is_computed_when_the_disk_is_too_small(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path, target)
    needed = store.space_for([data]).num_bytes
    usage = feature_store.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(
        OSError, match=rf"of 40 sequences \({data.num_tokens} tokens x 48 bytes\) take .* are free; give"
    ):
        extract(target, [data], store)
    assert not shards(tmp_path)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage._replace(free=needed))
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
        assert bool((store.read(batch, CPU) == 1).all())
        store.flush()
    assert len(shards(tmp_path)) == 1


# --- kills, full disks, missing files --------------------------------------------------------------------------------


def test_an_extraction_that_is_killed_goes_on_and_ends_whole(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    rng, counts = random.Random(0), [0]
    while not survives(rng.randrange(1, 1200), lambda: extract(target, [data], new_store(tmp_path, target))):
        counts.append(len(new_store(tmp_path, target)))
    assert counts == sorted(counts) and sum(0 < count < len(data) for count in counts) >= 2, "killed in the middle"
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
    os.utime(old, (0, time.time() - 2 * feature_store.ABANDONED_S))
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
    monkeypatch.setattr(feature_sources, "FORWARD_TOKENS", 1)

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
    before = open_store(tmp_path)
    lost = shards(tmp_path)[2]
    num_lost = len(load_file(lost)["ids"])
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is gone; run `taps-ext features`"):
        read_all(StoredFeatures(before, ends_of(target), CPU), data)
    with pytest.raises(
        ValueError, match=f"^{num_lost} of 40 sequences have no features in .*; run `taps-ext features`"
    ):
        open_store(tmp_path).require([data])
    with pytest.raises(ValueError, match=r"has no features of sequence [0-9a-f]{16}; run"):
        read_all(stored(tmp_path, target), data)
    assert extract(target, [data], new_store(tmp_path, target)) == num_lost
    assert_holds(tmp_path, target, data)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_changed_byte_anywhere_in_a_file_is_noticed(target: FrozenTarget, data: TokenDataset, tmp_path: Path) -> None:
    filled_store(tmp_path, target, data)
    path = shards(tmp_path)[1]
    content, rng = path.read_bytes(), random.Random(0)
    tensors = load_file(path)
    data_start = len(content) - tensors["features"].numel() * 2
    positions = {*range(8), *rng.sample(range(8, data_start), 150), *rng.sample(range(data_start, len(content)), 80)}
    for position in sorted(positions):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged \(.*\); delete it and run `taps-ext features`"):
            read_all(stored(tmp_path, target), data)


def test_only_the_sequence_whose_bytes_changed_is_refused(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    path = shards(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 4  # of the last sequence
    path.write_bytes(content)
    last, source = int(load_file(path)["ids"][-1]) % 2**64, stored(tmp_path, target)
    for batch in rows(data):
        if batch.ids[0] != last:
            source.draft_batch(batch)
            continue
        with pytest.raises(ValueError, match=f"{path.name} is damaged .sequence .*; delete it and run `taps-ext feat"):
            source.draft_batch(batch)


def test_a_file_of_another_length_is_noticed_when_the_store_is_opened(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    filled_store(tmp_path, target, data)
    path = shards(tmp_path)[3]
    content, rng = path.read_bytes(), random.Random(1)
    lengths = [0, 1, 7, 8, 9, len(content) - 1, *(rng.randrange(len(content)) for _ in range(60))]
    for changed in [content[:length] for length in lengths] + [content + b"\0"]:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged \(.*\); delete it and run `taps-ext features`"):
            open_store(tmp_path)
    path.unlink()
    extract(target, [data], new_store(tmp_path, target))
    assert_holds(tmp_path, target, data)


def test_a_file_that_is_cut_while_it_is_used_is_noticed(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled_store(tmp_path, target, data)
    store, path = open_store(tmp_path), shards(tmp_path)[0]
    last = rows(data)[data.ids.index(int(load_file(path)["ids"][-1]) % 2**64)]
    memory = torch.empty(data.length(data.ids.index(last.ids[0])), HIDDEN, dtype=torch.bfloat16)
    monkeypatch.setattr(feature_shards.torch, "empty", lambda *_, **__: memory)  # as an allocator may do
    store.read(last, CPU)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        store.read(last, CPU)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "3", '{"format": 1}', {"target": 3}, {"target": {}}, {"dtype": "x"}]
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
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="feature store of format 2 and this version reads 1; use the version"):
        open_store(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no features in {folder}: there is no {MANIFEST}; run `taps-ext"):
        open_store(folder)
    with pytest.raises(ValueError, match=f"has features and no {MANIFEST} that says whose"):
        new_store(folder, target)


@pytest.mark.parametrize("kind", ["dtype", "hidden_size", "target", "foreign"])
def test_a_file_from_another_store_is_refused(
    kind: str, target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    other = {
        "dtype": lambda: (target, "float16"),
        "hidden_size": lambda: (FrozenTarget(make_model(hidden_size=32)), "bfloat16"),
        "target": lambda: (changed_model("model.norm.weight"), "bfloat16"),
        "foreign": lambda: (target, "float32"),
    }[kind]()
    store = new_store(tmp_path / "other", *other)
    extract(other[0], [data], store)
    filled_store(tmp_path / "store", target, data)
    stranger = shards(tmp_path / "other")[0]
    if kind == "foreign":
        torch.manual_seed(0)
        target.model.save_pretrained(tmp_path / "model")
        stranger = tmp_path / "model" / "model.safetensors"
    (tmp_path / "store" / "features-stranger.safetensors").write_bytes(stranger.read_bytes())
    sentence = "is damaged" if kind == "foreign" else "holds .* features .* and its folder is for bfloat16 .*; move"
    with pytest.raises(ValueError, match=f"features-stranger.safetensors {sentence}"):
        open_store(tmp_path / "store")


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


# --- features kept as a run goes -------------------------------------------------------------------------------------

STEPS, CHECKPOINT_STEPS = 24, 5  # some two and a half epochs of 40 sequences in batches of 4
both_ways = pytest.mark.parametrize("one_by_one", [("cpu",), ()], ids=["row by row", "whole batches, as on a GPU"])


def run_steps(folder: Path, target: FrozenTarget, data: TokenDataset, first: int, log: Path) -> None:
    """A cached run from a checkpoint on: each step's batch is logged by what is in it, `flush` before checkpoints."""
    source: FeatureSource = CachedFeatures(target, new_store(folder, target, "float32"))  # rounding would hide bits
    order = BatchOrder(data, 4, seed=3)
    for step in range(first, STEPS):
        batch = source.draft_batch(data.batch(order[step]))
        real = [batch.features[row, :length] for row, length in enumerate(batch.lengths)]
        digest = hashlib.sha256(b"".join(row.contiguous().numpy().tobytes() for row in real)).hexdigest()
        with log.open("a") as file:
            file.write(json.dumps([step, digest]) + "\n")
        if (step + 1) % CHECKPOINT_STEPS == 0:
            source.flush()
            with log.open("a") as file:
                file.write(json.dumps([step + 1, "checkpoint"]) + "\n")


def read_log(log: Path) -> tuple[dict[int, set[str]], int]:
    """What each step's batch was, whenever it ran; and the latest checkpoint."""
    digests: dict[int, set[str]] = {step: set() for step in range(STEPS)}
    checkpoint = 0
    for line in log.read_text().splitlines() if log.exists() else []:
        step, digest = json.loads(line)
        if digest == "checkpoint":
            checkpoint = step
        else:
            digests[step].add(digest)
    return digests, checkpoint


@both_ways
@pytest.mark.parametrize("seed", range(2))
def test_a_cached_run_that_is_killed_replays_the_same_bits(
    seed: int,
    one_by_one: Sequence[str],
    target: FrozenTarget,
    data: TokenDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_sources, "ONE_BY_ONE", one_by_one)
    run_steps(tmp_path / "whole", target, data, 0, tmp_path / "whole.jsonl")
    expected, _ = read_log(tmp_path / "whole.jsonl")
    log, rng, num_runs = tmp_path / "killed.jsonl", random.Random(seed), 1

    def resume() -> None:
        run_steps(tmp_path / "killed", target, data, read_log(log)[1], log)

    while not survives(rng.randrange(1, 2500), resume):
        num_runs += 1
    assert num_runs > 2 and read_log(log)[0] == expected


def test_the_first_epoch_of_a_cached_run_sees_what_later_ones_read(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path
) -> None:
    source = CachedFeatures(target, new_store(tmp_path, target))
    computed = [source.draft_batch(batch) for batch in rows(data)]
    source.flush()
    again = CachedFeatures(target, new_store(tmp_path, target))
    for batch, first in zip(rows(data), computed, strict=True):
        assert_equal(source.draft_batch(batch), first)
        assert_equal(again.draft_batch(batch), first)
    assert_holds(tmp_path, target, data)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ids of each batch that the target computes from now on."""
    computed: list[tuple[int, ...]] = []
    online = FrozenTarget.features

    def features(self: FrozenTarget, batch: TokenBatch) -> Tensor:
        computed.append(batch.ids)
        return online(self, batch)

    monkeypatch.setattr(FrozenTarget, "features", features)
    return computed


@both_ways
def test_a_batch_that_is_stored_in_part_is_computed_as_it_was_before(
    one_by_one: Sequence[str],
    target: FrozenTarget,
    data: TokenDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bits of a row depend on the rows beside it, where there are any."""
    monkeypatch.setattr(feature_sources, "ONE_BY_ONE", one_by_one)
    store, batch = new_store(tmp_path, target), data.batch([0, 1, 2, 3])
    store.add(batch.ids[2], torch.ones(data.length(2), HIDDEN))
    computed = spy(monkeypatch)
    features = CachedFeatures(target, store).draft_batch(batch).features
    assert computed == ([(batch.ids[row],) for row in (0, 1, 3)] if one_by_one else [batch.ids])
    assert bool((features[2, : data.length(2) - 1] == 1).all()), "what is stored is what is read"


@both_ways
def test_a_cached_run_computes_each_sequence_once(
    one_by_one: Sequence[str],
    target: FrozenTarget,
    data: TokenDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_sources, "ONE_BY_ONE", one_by_one)
    computed = spy(monkeypatch)
    for _ in range(2):
        run_steps(tmp_path / "store", target, data, 0, tmp_path / "log.jsonl")
    assert sorted(id for ids in computed for id in ids) == sorted(data.ids)


def test_a_cached_run_finds_what_others_have_written(target: FrozenTarget, data: TokenDataset, tmp_path: Path) -> None:
    first, second = new_store(tmp_path, target), new_store(tmp_path, target)
    extract(target, [data], first)
    assert data.ids[0] not in second
    CachedFeatures(target, second).flush()
    second.require([data])


def test_what_waits_for_long_is_written_before_its_file_is_full(
    target: FrozenTarget, data: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path, identify(target.model), "bfloat16")
    store.add(1, torch.ones(3, HIDDEN))
    assert not shards(tmp_path)
    monkeypatch.setattr(feature_store, "LONGEST_WAIT_S", 0.0)
    store.add(2, torch.ones(3, HIDDEN))
    assert len(shards(tmp_path)) == 1 and len(open_store(tmp_path)) == 2
