"""Exports: a variant differs from the canonical folder exactly as docs/checkpoints.md says, or is refused and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from drafter_files import (
    FORMS,
    LLAMA3_ROPE,
    PUBLISHED_KEYS,
    ROPES,
    H,
    V,
    accelerate_state,
    any_shape,
    config_of,
    files_in,
    make_network,
    make_target,
    network_of_shape,
    published_config,
    published_tensors,
    save,
    save_shape,
    stored,
    without,
    write,
)
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM

from taps_ext.checkpoints import export_drafter, load_network, validate_drafter
from taps_ext.checkpoints.export import LOADERS
from taps_ext.cli import main
from taps_ext.drafters import EagleNetwork
from taps_ext.drafters.network import rope_of

CANONICAL = ("eagle", "hass", "vllm")


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return make_target(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def target_folder(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "target"
    target.save_pretrained(folder)
    return folder


# --- what the variants hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", CANONICAL)
def test_eagle_hass_and_vllm_read_the_canonical_folder_byte_for_byte(
    to: str, target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    canonical = save(
        target, tmp_path / "d", make_network(target), {"objective": "hass", "target": {"name": "meta/Llama"}}
    )
    for given in (None, target_folder):
        assert files_in(export_drafter(canonical, to, tmp_path / "out", target=given)) == files_in(canonical)


@pytest.mark.parametrize("fc_bias", [False, True])
def test_sglang_gets_its_architecture_and_an_fc_bias(fc_bias: bool, target: LlamaForCausalLM, tmp_path: Path) -> None:
    canonical = save(target, tmp_path / "d", make_network(target, fc_bias=fc_bias), {"domain": "math"})
    exported = export_drafter(canonical, "sglang", tmp_path / "out")
    before, after = config_of(canonical), config_of(exported)
    assert after.pop("architectures") == ["LlamaForCausalLMEagle"]
    assert before.pop("architectures") == ["LlamaForCausalLM"]
    assert fc_bias == (before["taps"].pop("sha256") == after["taps"].pop("sha256"))
    assert before == after
    assert (after.get("bias", False), after["attention_bias"]) == (False, False)
    tensors, added = stored(canonical), stored(exported)
    bias = added.pop("fc.bias")
    assert bias.equal(tensors.pop("fc.bias") if fc_bias else torch.zeros(H))
    assert added.keys() == tensors.keys() == PUBLISHED_KEYS
    assert all(added[name].equal(tensors[name]) for name in tensors)
    assert sorted(files_in(exported)) == ["config.json", "model.safetensors"]


def test_an_export_to_sglang_can_be_taken_back(target: LlamaForCausalLM, tmp_path: Path) -> None:
    """So that the copies that others published for SGLang serve vLLM too."""
    canonical = save(target, tmp_path / "d", make_network(target), {"domain": "math"})
    there = export_drafter(canonical, "sglang", tmp_path / "there")
    assert files_in(export_drafter(there, "vllm", tmp_path / "back")) == files_in(canonical)


@pytest.mark.parametrize("seed", range(20))
def test_every_shape_that_is_exported_is_the_same_network_and_validates(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    network = network_of_shape(any_shape(random), seed).to(random.choice((torch.float32, torch.bfloat16)))
    canonical = save_shape(tmp_path / "d", network, {"domain": "math"})
    for to in LOADERS:
        try:
            folder = export_drafter(canonical, to, tmp_path / to)
        except ValueError as error:
            assert " cannot be exported to " in str(error)  # noqa: PT017 - which ones are is told below
            assert not (tmp_path / to).exists()
            continue
        report = validate_drafter(folder)
        assert (report.passed, report.loaders[to]) == (True, ())
        loaded = load_network(folder).state_dict()
        assert all(loaded[name].equal(value) for name, value in network.state_dict().items())
        assert all(name in network.state_dict() or not value.any() for name, value in loaded.items())
        understood = AutoConfig.from_pretrained(folder)
        assert rope_of(understood) == (network.config.rope_theta, network.config.rope_scaling)
        assert (understood.head_dim, understood.vocab_size) == (network.config.head_dim, network.config.vocab_size)
        again = export_drafter(folder, to, tmp_path / "again")
        assert files_in(again) == files_in(folder), "an export of an export changes nothing"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_canonical_folder(
    form: str, target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    network = make_network(target)
    folder = FORMS[form](tmp_path / "drafter", published_tensors(target, network))
    given, expected = export_drafter(folder, "hass", tmp_path / "out", target=target_folder), tmp_path / "expected"
    config = config_of(save(target, expected, network))
    exported = config_of(given)
    # What the foreign config did not say, or said otherwise, is all that may differ.
    assert exported["taps"].pop("imported_from") == "drafter"
    assert exported["taps"].pop("target") == {"name": "target"}
    assert exported["taps"].keys() == {"sha256"}
    assert exported | {"taps": {}} == config | {"taps": {}}
    assert stored(given).keys() == PUBLISHED_KEYS
    assert all(stored(given)[name].equal(value) for name, value in stored(expected).items())


# --- training states -------------------------------------------------------------------------------------------------


def official_hass_state(folder: Path, target: LlamaForCausalLM, network: EagleNetwork, has_embedding: bool) -> Path:
    """As `accelerate.save_state` leaves the HASS trainer's two modules: no config, a head, an optimizer, pickles."""
    tensors = published_tensors(target, network)
    accelerate_state(folder, tensors if has_embedding else without(tensors, "embed_tokens.weight"))
    (folder / "config.json").unlink()
    (folder / "scheduler.bin").write_bytes(b"not read")
    (folder / "random_states_0.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    return folder


@pytest.mark.parametrize("has_embedding", [True, False])
def test_official_hass_states_are_completed_by_the_target(
    has_embedding: bool,
    target: LlamaForCausalLM,
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    network = make_network(target, intermediate_size=40)
    state = official_hass_state(tmp_path / "state", target, network, has_embedding)
    exported = export_drafter(state, "hass", tmp_path / "out", target=target_folder)
    assert config_of(exported)["taps"]["imported_from"] == "state"
    assert load_network(exported).config == network.config
    expected = stored(save(target, tmp_path / "expected", network))
    assert all(stored(exported)[name].equal(expected[name]) for name in PUBLISHED_KEYS)
    assert not Path("ran").exists()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*, or name the target"):
        export_drafter(state, "hass", tmp_path / "none")


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class TrainedPart(nn.Module):
    """As this library's trainer wraps the network."""

    def __init__(self, network: EagleNetwork) -> None:
        super().__init__()
        self.network = network


def test_a_checkpoint_of_this_librarys_training_can_be_exported(
    accelerator: Any, target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    network = make_network(target)
    model, optimizer = accelerator.prepare(TrainedPart(network), torch.optim.AdamW(network.parameters()))
    assert model is not None and optimizer is not None
    accelerator.save_state(str(tmp_path / "step-00000007"))
    exported = export_drafter(
        tmp_path / "step-00000007", "vllm", tmp_path / "out", target=target_folder, dtype="bfloat16"
    )
    expected = stored(save(target, tmp_path / "expected", network.bfloat16()))
    assert all(stored(exported)[name].equal(expected[name]) for name in PUBLISHED_KEYS)


# --- options ---------------------------------------------------------------------------------------------------------


def test_also_bin_writes_the_same_tensors_twice(target: LlamaForCausalLM, tmp_path: Path) -> None:
    canonical = save(target, tmp_path / "d", make_network(target))
    for to in LOADERS:
        folder = export_drafter(canonical, to, tmp_path / "out", also_bin=True)
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        assert sorted(files_in(folder)) == ["config.json", "model.safetensors", "pytorch_model.bin"]
        assert tensors.keys() == stored(folder).keys()
        assert all(tensors[name].equal(value) for name, value in stored(folder).items())
    assert len(files_in(export_drafter(canonical, "hass", tmp_path / "out"))) == 2, "replaced as a whole"


def test_a_dtype_is_written_into_tensors_and_config(target: LlamaForCausalLM, tmp_path: Path) -> None:
    canonical = save(target, tmp_path / "d", make_network(target))
    for name in ("float16", "bfloat16", "float32"):
        folder = export_drafter(canonical, "eagle", tmp_path / "out", dtype=name)
        assert {str(value.dtype) for value in stored(folder).values()} == {f"torch.{name}"}
        assert config_of(folder)["torch_dtype"] == config_of(folder)["dtype"] == name
    large = {**published_tensors(target, make_network(target)), "fc.weight": torch.full((H, 2 * H), 1e5)}
    write(tmp_path / "large", large)
    with pytest.raises(ValueError, match=r"fc\.weight holds values that float16 cannot; use bfloat16"):
        export_drafter(tmp_path / "large", "eagle", tmp_path / "none", dtype="float16")
    assert not (tmp_path / "none").exists()


def test_the_context_length_is_the_longer_of_both(
    target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    published = write(tmp_path / "d", published_tensors(target, make_network(target)))

    def length(**arguments: Any) -> int:
        config = config_of(export_drafter(published, "vllm", tmp_path / "out", **arguments))
        return int(config["max_position_embeddings"])

    assert (length(), length(target=target_folder)) == (2048, 4096)


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[tuple[str, str], dict[str, Any]] = {
    ("vllm", "fc.bias is inside, and its network has none"): {"fc_bias": True},
    ("sglang", "it knows biases of all four attention projections or of none"): {"qkv_bias": True},
    ("eagle", "head_dim is 16, and it takes hidden_size / num_attention_heads"): {"head_dim": 16},
    ("hass", "head_dim is 16, and it takes hidden_size / num_attention_heads"): {"head_dim": 16},
    ("eagle", "rope scaling llama3 is unknown to it"): {"rope_scaling": LLAMA3_ROPE},
    ("hass", "rope scaling yarn is unknown to it"): {"rope_scaling": ROPES["yarn"]},
    ("eagle", "with scaled rope it takes a theta of 10000 whatever config.json says, and this one is 500000"): {
        "rope_scaling": ROPES["linear"]
    },
    ("eagle", "the factor of rope_scaling must be a float above 1, got 0.5"): {
        "rope_scaling": {"rope_type": "linear", "factor": 0.5}
    },
    ("vllm", "hidden_act is gelu, and it knows silu only"): {"hidden_act": "gelu"},
    ("sglang", "hidden_act is gelu, and it knows silu only"): {"hidden_act": "gelu"},
}
READ: list[tuple[str, dict[str, Any]]] = [
    ("eagle", {"fc_bias": True}),
    ("hass", {"qkv_bias": True}),
    ("vllm", {"qkv_bias": True}),
    ("sglang", {"fc_bias": True}),
    ("vllm", {"head_dim": 16}),
    ("sglang", {"rope_scaling": LLAMA3_ROPE}),
    ("eagle", {"rope_scaling": ROPES["linear"], "rope_theta": 10000.0}),
    ("hass", {"hidden_act": "gelu"}),
]


@pytest.mark.parametrize("to, reason", REFUSED)
def test_what_a_loader_would_misread_is_refused_with_the_reason(
    to: str, reason: str, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    canonical = save(target, tmp_path / "d", make_network(target, **REFUSED[to, reason]))
    with pytest.raises(ValueError, match=f"d cannot be exported to {to}: ") as caught:
        export_drafter(canonical, to, tmp_path / "out")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("to, overrides", READ)
def test_what_a_loader_reads_is_not_refused(
    to: str, overrides: dict[str, Any], target: LlamaForCausalLM, tmp_path: Path
) -> None:
    canonical = save(target, tmp_path / "d", make_network(target, **overrides))
    assert validate_drafter(export_drafter(canonical, to, tmp_path / "out")).loaders[to] == ()


def test_biases_are_spelt_as_their_readers_take_them(target: LlamaForCausalLM, tmp_path: Path) -> None:
    """`bias` is fc's to EAGLE and attention's to vLLM; `attention_bias` is of four projections, `qkv_bias` of three."""
    config = config_of(save(target, tmp_path / "d", make_network(target, qkv_bias=True)))
    assert (config["bias"], config["attention_bias"], config["qkv_bias"]) == (False, False, True)
    assert "qkv_bias" not in config_of(save(target, tmp_path / "d", make_network(target)))


BROKEN: dict[str, Callable[[LlamaForCausalLM, Path], Path]] = {
    "must be .* by its config, got": lambda t, f: write(
        f, {**published_tensors(t, make_network(t)), "fc.weight": torch.ones(H, H)}
    ),
    r"fc\.weight in .* holds NaN or infinite values": lambda t, f: write(
        f, {**published_tensors(t, make_network(t)), "fc.weight": torch.full((H, 2 * H), torch.nan)}
    ),
    r"embed_tokens\.weight in .* holds NaN or infinite values": lambda t, f: write(
        f, {**published_tensors(t, make_network(t)), "embed_tokens.weight": torch.full((V, H), torch.inf)}
    ),
    "holds an EAGLE-3 drafter": lambda t, f: write(
        f, {**published_tensors(t, make_network(t)), "midlayer.mlp.up_proj.weight": torch.ones(1)}
    ),
    "drafter rope theta 10000 differs from target rope theta 500000": lambda t, f: write(
        f, published_tensors(t, make_network(t)), published_config(rope_theta=10000.0)
    ),
    "the embedding in .* differs from that of .*; give the target that it was trained for": lambda t, f: write(
        f, {**published_tensors(t, make_network(t)), "embed_tokens.weight": torch.ones(V, H)}
    ),
    "drafter vocabulary 62 differs from target vocabulary 61": lambda t, f: save(
        other := make_target(vocab_size=62), f, make_network(other)
    ),
    "cannot be read as tensors and nothing else": lambda t, f: damaged(write(f, {"x": torch.ones(1)})),
    "no weights in": lambda t, f: emptied(write(f, {"x": torch.ones(1)})),
}


def damaged(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return folder


def emptied(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_and_foreign_drafters_are_not_exported(
    sentence: str, target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    folder = BROKEN[sentence](target, tmp_path / "d")
    before = files_in(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        export_drafter(folder, "eagle", tmp_path / "out", target=target_folder)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_asked_for(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", without(published_tensors(target, make_network(target)), "embed_tokens.weight"))
    for arguments, sentence in (
        ({"to": "eagle"}, "holds no embedding; name its target, whose embedding is put in: --target"),
        ({"to": "trtllm"}, "can be exported to eagle, hass, vllm, sglang, got 'trtllm'"),
        ({"to": "eagle", "dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (
            {"to": "eagle", "target": tmp_path / "nowhere"},
            "no target at .*: it is neither a directory with config.json",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            export_drafter(folder, output=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="out is a file; give a new directory"):
        export_drafter(folder, "eagle", tmp_path / "out")


# --- the target's files ----------------------------------------------------------------------------------------------


def test_of_a_sharded_target_only_the_shard_of_the_embedding_is_read(target: LlamaForCausalLM, tmp_path: Path) -> None:
    target.save_pretrained(tmp_path / "target", max_shard_size="20KB")
    shards = sorted((tmp_path / "target").glob("model-*.safetensors"))
    assert len(shards) > 2
    folder = write(tmp_path / "d", without(published_tensors(target, make_network(target)), "embed_tokens.weight"))
    holding = [shard for shard in shards if b"embed_tokens" in shard.read_bytes()[:2000]]
    for shard in shards:
        if shard not in holding:
            shard.write_bytes(b"not read")
    exported = export_drafter(folder, "hass", tmp_path / "out", target=tmp_path / "target")
    assert stored(exported)["embed_tokens.weight"].equal(target.get_input_embeddings().weight)
    holding[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-.*\.safetensors, which is not there"):
        export_drafter(folder, "hass", tmp_path / "out", target=tmp_path / "target")


def test_of_a_target_on_the_hub_only_config_and_that_shard_are_fetched(
    target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, cache, asked = tmp_path / "hub", tmp_path / "cache", []
    target.save_pretrained(hub, max_shard_size="20KB")
    cache.mkdir()

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        for path in (path for pattern in allow_patterns for path in hub.glob(pattern)):
            shutil.copy(path, cache)
        return str(cache)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, revision: target.config)
    folder = write(tmp_path / "d", without(published_tensors(target, make_network(target)), "embed_tokens.weight"))
    exported = export_drafter(folder, "hass", tmp_path / "out", target="owner/target")
    assert stored(exported)["embed_tokens.weight"].equal(target.get_input_embeddings().weight)
    assert config_of(exported)["taps"]["target"] == {"name": "owner/target"}
    *looked_for, shard = asked
    assert looked_for == ["model.safetensors", "model.safetensors.index.json"]
    assert b"embed_tokens" in (hub / shard).read_bytes()[:2000]
    assert {path.name for path in cache.iterdir()} == {"model.safetensors.index.json", shard}


def test_targets_with_bin_weights_or_without_are_told_apart(
    target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "d", without(published_tensors(target, make_network(target)), "embed_tokens.weight"))
    place = tmp_path / "target"
    place.mkdir()
    shutil.copy(target_folder / "config.json", place)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*target: none of"):
        export_drafter(folder, "hass", tmp_path / "out", target=place)
    torch.save(target.state_dict(), place / "pytorch_model.bin")
    assert stored(export_drafter(folder, "hass", tmp_path / "out", target=place)).keys() == PUBLISHED_KEYS
    torch.save({"lm_head.weight": torch.ones(V, H)}, place / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold one tensor named \.\.\.embed_tokens\.weight or .*, got none"):
        export_drafter(folder, "hass", tmp_path / "out", target=place)
    torch.save({"model.embed_tokens.weight": torch.ones(V, 2 * H)}, place / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be \[61, 32\] of floats by its config, got \[61, 64\]"):
        export_drafter(folder, "hass", tmp_path / "out", target=place)
    (place / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"the config of the target .* cannot be read") as caught:
        export_drafter(folder, "hass", tmp_path / "out", target=place)
    assert "\n" not in str(caught.value)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_exports_and_says_what_it_cannot_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["export", "tiny/math", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    place = tmp_path / "out"
    assert run("--to", "eagle", "--output", place) == (0, f"wrote {place}\n", "")
    code, out, _ = run("--to", "sglang", "--output", place)
    assert (code, out.splitlines()[1]) == (
        0,
        "its max_position_embeddings is 2048: if the target's is larger, export it with --target",
    )
    assert run("--to", "sglang", "--output", place, "--target", "tiny", "--also-bin", "--dtype", "float16") == (
        0,
        f"wrote {place}\n",
        "",
    )
    assert sorted(files_in(place)) == ["config.json", "model.safetensors", "pytorch_model.bin"]
    code, out, err = run("--to", "medusa", "--output", tmp_path / "none")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "none").exists()
