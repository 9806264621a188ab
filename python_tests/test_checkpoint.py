"""Drafter checkpoints: every published form loads, what does not fit is refused in a sentence, saving is exact."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from drafter_files import (
    FORMS,
    LLAMA3_ROPE,
    PUBLISHED_KEYS,
    H,
    Tensors,
    V,
    accelerate_state,
    files_in,
    make_network,
    make_target,
    published_config,
    published_tensors,
    save,
    without,
    write,
    write_sharded,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from taps_ext.checkpoints import files as checkpoint_files
from taps_ext.checkpoints import load_drafter, load_drafters, load_network, save_drafter, validate_drafter
from taps_ext.drafters import EagleConfig, EagleNetwork
from taps_ext.target.model import TargetModel


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return make_target()


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_found_in_the_wild_loads_bit_exactly(form: str, target: LlamaForCausalLM, tmp_path: Path) -> None:
    network = make_network(target)
    folder = FORMS[form](tmp_path / "drafter", published_tensors(target, network))
    drafter = load_drafter(folder, target)
    assert drafter.name == "drafter"
    loaded = drafter.network.state_dict()
    assert loaded.keys() == network.state_dict().keys() == PUBLISHED_KEYS - {"embed_tokens.weight"}
    assert all(loaded[key].equal(value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("overrides", [{"fc_bias": True}, {"qkv_bias": True}])
def test_biases_in_the_file_are_loaded_whatever_the_config_says(
    overrides: Any, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    network = make_network(target, **overrides)
    loaded = load_drafter(write(tmp_path / "d", published_tensors(target, network)), target).network
    assert loaded.config == EagleConfig.for_target(target.config, **overrides)
    assert all(loaded.state_dict()[key].equal(value) for key, value in network.state_dict().items())


def test_loading_shares_the_targets_embedding_and_lm_head(target: LlamaForCausalLM, tmp_path: Path) -> None:
    drafter = load_drafter(write(tmp_path / "d", published_tensors(target, make_network(target))), target, "math")
    assert drafter.name == "math"
    assert drafter.embedding.weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()
    assert drafter.lm_head.weight.data_ptr() == target.get_output_embeddings().weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in drafter.network.parameters())


def test_a_target_model_is_as_good_as_its_transformers_model(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", published_tensors(target, make_network(target)))
    assert load_drafter(folder, TargetModel(target)).embedding is target.get_input_embeddings()
    with pytest.raises(ValueError, match="must be a transformers model with an LM head, got str"):
        load_drafter(folder, "name")


def test_drafters_keep_the_order_they_are_given_in(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folders = {
        name: write(tmp_path / name, published_tensors(target, make_network(target))) for name in ("z", "a", "m")
    }
    drafters = load_drafters(folders, target)
    assert list(drafters) == [drafter.name for drafter in drafters.values()] == ["z", "a", "m"]


def test_a_float16_file_is_cast_to_the_targets_bfloat16(tmp_path: Path) -> None:
    target = make_target().to(torch.bfloat16)
    tensors = {key: value.half() for key, value in published_tensors(target, make_network(target)).items()}
    drafter = load_drafter(write(tmp_path / "d", tensors), target)
    assert {parameter.dtype for parameter in drafter.network.parameters()} == {torch.bfloat16}
    assert load_network(tmp_path / "d").fc.weight.dtype == torch.float16


def test_a_training_state_without_config_takes_the_targets_shape(target: LlamaForCausalLM, tmp_path: Path) -> None:
    network = make_network(target, intermediate_size=40)
    folder = accelerate_state(tmp_path / "state", published_tensors(target, network))
    (folder / "config.json").unlink()
    with pytest.warns(UserWarning, match=r"no config\.json in .*: heads, rope and norm are taken from the target"):
        assert load_drafter(folder, target).network.config == network.config
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        load_network(folder)


def test_foreign_embeddings_and_lm_heads_are_warned_of(target: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors = published_tensors(target, make_network(target))
    lm_head = target.get_output_embeddings().weight.detach().clone()
    load_drafter(write(tmp_path / "own", {**tensors, "lm_head.weight": lm_head}), target)
    with pytest.warns(UserWarning, match="the embedding in .* differs from the target's") as caught:
        load_drafter(write(tmp_path / "e", {**tensors, "embed_tokens.weight": torch.ones(V, H)}), target)
    assert caught[0].filename == __file__, "a warning names the line that called the library"
    with pytest.warns(UserWarning, match="the lm_head in .* differs from the target's"):
        load_drafter(write(tmp_path / "h", {**tensors, "head.weight": -lm_head}), target)


def test_llama3_rope_is_read_in_both_spellings(tmp_path: Path) -> None:
    target = make_target(rope_scaling=dict(LLAMA3_ROPE), max_position_embeddings=512)
    tensors = published_tensors(target, make_network(target))
    old = published_config(rope_scaling=LLAMA3_ROPE)
    new = published_config(rope_theta=None, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0})
    for name, config in (("old", old), ("new", new)):
        loaded = load_drafter(write(tmp_path / name, tensors, config), target).network.config
        assert (loaded.rope_theta, loaded.rope_scaling) == (500000.0, LLAMA3_ROPE)
    with pytest.warns(UserWarning, match="drafter rope scaling None differs from target rope scaling"):
        load_drafter(write(tmp_path / "plain", tensors), target)


def test_a_hub_id_fetches_only_config_and_weights(
    target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "hub", published_tensors(target, make_network(target)), name="pytorch_model.bin")
    asked = []

    def snapshot_download(repo_id: str, *, revision: None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_drafter("owner/drafter", target).name == "drafter"
    assert {repo_id for repo_id, _ in asked} == {"owner/drafter"}
    assert [any("safetensors" in p for p in patterns) for _, patterns in asked] == [True, False]
    assert all("config.json" in patterns and not any(".py" in p for p in patterns) for _, patterns in asked)


# --- refusals ------------------------------------------------------------------------------------------------------


def refusal(folder: Path, target: LlamaForCausalLM) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_drafter(folder, target)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_drafter_of_another_target_is_refused_with_both_numbers(target: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors = published_tensors(target, make_network(target))

    def message(**overrides: Any) -> str:
        return refusal(write(tmp_path / "d", tensors, published_config(**overrides)), target)

    assert message(vocab_size=32000) == (
        "drafter vocabulary 32000 differs from target vocabulary 61; use a drafter trained on this target's tokenizer"
    )
    assert "drafter hidden size 64 differs from target hidden size 32" in message(hidden_size=64)
    assert "drafter rope theta 10000 differs from target rope theta 500000" in message(rope_theta=None)
    assert message(hidden_size=None, vocab_size=None).endswith("does not give hidden_size, vocab_size")
    assert "rope type must be one of" in message(rope_scaling={"type": "dynamic", "factor": 2.0})


def test_wrong_tensors_are_refused_by_name(target: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors = published_tensors(target, make_network(target))

    def message(changed: Tensors) -> str:
        return refusal(write(tmp_path / "d", changed), target)

    extra = {
        **without(tensors, "fc.weight"),
        "norm.weight": torch.ones(H),
        "layers.1.mlp.up_proj.weight": torch.ones(1),
    }
    assert message(extra).endswith("missing fc.weight; unexpected layers.1.mlp.up_proj.weight, norm.weight")
    assert "fc.weight in" in message({**tensors, "fc.weight": torch.zeros(H, 3 * H)})
    assert "must be [32, 64] by its config, got [32, 96]" in message({**tensors, "fc.weight": torch.zeros(H, 3 * H)})
    assert "EAGLE-3" in message({**tensors, "d2t": torch.zeros(V)})
    assert "k_proj.bias" in message({**tensors, "layers.0.self_attn.q_proj.bias": torch.zeros(H)})
    broken = {**tensors, "fc.weight": tensors["fc.weight"].clone().fill_(torch.nan)}
    assert "fc.weight in" in (text := message(broken))
    assert "NaN" in text


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_bin_file_is_never_run(
    target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "d", {"fc.weight": Payload()}, name="pytorch_model.bin")  # type: ignore[dict-item]
    assert "cannot be read as tensors and nothing else" in refusal(folder, target)
    assert not Path("ran").exists()
    torch.save({"state_dict": {}}, folder / "pytorch_model.bin")
    assert "must hold a dict of tensors" in refusal(folder, target)


def test_unreadable_files_are_named(target: LlamaForCausalLM, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = write(tmp_path / name, {"x": torch.zeros(1)}, name=name)
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        assert f"{name} cannot be read as tensors" in refusal(folder, target)
        (folder / "config.json").write_text("{")
        assert "config.json is not JSON" in refusal(folder, target)


def test_shards_outside_of_the_folder_are_not_read(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "d", published_tensors(target, make_network(target)), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../x.safetensors"}}))
    assert "names shards outside of its directory" in refusal(folder, target)


def test_missing_places_are_named(target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="neither a directory nor a hub id such as owner/name"):
        load_drafter(tmp_path / "nowhere", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*: none of model\.safetensors"):
        load_drafter(tmp_path / "empty", target)

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"the hub gave no files of that name \(no route\); give a directory"):
        load_drafter("owner/drafter", target)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saving_and_loading_is_bit_exact_with_the_published_keys(dtype: torch.dtype, tmp_path: Path) -> None:
    target = make_target(rope_scaling=dict(LLAMA3_ROPE), max_position_embeddings=4096).to(dtype)
    network = make_network(target, head_dim=16).to(dtype)
    metadata = {"algorithm": "hass", "domain": "math", "trained_length": 1024}
    folder = save_drafter(
        network,
        tmp_path / "new" / "drafter",
        embedding=target.get_input_embeddings(),
        target_config=target.config,
        metadata=metadata,
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == ["drafter"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == PUBLISHED_KEYS
    assert stored["embed_tokens.weight"].equal(target.get_input_embeddings().weight)
    loaded = load_drafter(folder, target).network
    assert loaded.config == network.config
    for key, value in network.state_dict().items():
        assert stored[key].dtype == dtype
        assert stored[key].equal(value)
        assert loaded.state_dict()[key].equal(value)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["taps"]) == metadata


def test_the_saved_config_speaks_both_spellings(target: LlamaForCausalLM, tmp_path: Path) -> None:
    def saved(name: str, **overrides: Any) -> dict[str, Any]:
        network = make_network(target, **overrides)
        folder = save_drafter(
            network, tmp_path / name, embedding=target.get_input_embeddings(), target_config=target.config
        )
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return config

    config = saved("plain", max_position_embeddings=128)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, None)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert (config["bias"], config["num_hidden_layers"], config["tie_word_embeddings"]) == (False, 1, False)
    assert config["max_position_embeddings"] == target.config.max_position_embeddings
    assert "head_dim" not in config
    assert "bias" not in saved("biased", fc_bias=True)  # readers of the published format then assume the bias
    assert saved("wide", head_dim=16)["head_dim"] == 16
    linear = saved("linear", rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert linear["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_saving_replaces_a_drafter_and_nothing_else(target: LlamaForCausalLM, tmp_path: Path) -> None:
    def save(folder: Path, seed: int) -> EagleNetwork:
        network = make_network(target, seed)
        save_drafter(network, folder, embedding=target.get_input_embeddings().weight, target_config=target.config)
        return network

    save(tmp_path / "d", 1)
    second = save(tmp_path / "d", 2)
    assert load_network(tmp_path / "d").fc.weight.equal(second.fc.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\); give a new directory"):
        save(tmp_path / "d", 3)


def test_an_embedding_of_another_shape_is_not_saved(target: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the embedding must be \[61, 32\], got \[60, 32\]"):
        save_drafter(make_network(target), tmp_path / "d", embedding=torch.zeros(60, H), target_config=target.config)


# --- damage ----------------------------------------------------------------------------------------------------------


def is_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and len(str(error)) > 40


def test_a_changed_byte_of_a_saved_drafter_never_goes_unnoticed(target: LlamaForCausalLM, tmp_path: Path) -> None:
    weights = save(target, tmp_path / "d", make_network(target)) / "model.safetensors"
    whole, random = weights.read_bytes(), Random(0)
    for _ in range(40):
        position = random.randrange(len(whole))
        changed = bytes((whole[position] ^ (1 << random.randrange(8)),))
        weights.write_bytes(whole[:position] + changed + whole[position + 1 :])
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_network(tmp_path / "d")
        assert is_sentence(caught.value)
    weights.write_bytes(whole)
    load_network(tmp_path / "d")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_damaged_files_of_any_origin_load_or_give_a_sentence(
    name: str, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Without a digest a changed weight looks like any other; nothing else may happen than that."""
    tensors, random = published_tensors(target, make_network(target)), Random(1)
    make = write_sharded if name.endswith(".index.json") else write
    folder = make(tmp_path / "d", tensors, name=name.removesuffix(".index.json"))
    whole = {path: path.read_bytes() for path in (folder / name, folder / "config.json")}
    refusals = []
    for case in range(120):
        path, content = random.choice(list(whole.items()))
        position = random.randrange(len(content) if case % 3 else min(len(content), 1500))  # also where headers are
        is_cut = case % 4 == 0 and content[position:].strip()
        path.write_bytes(content[:position] + (b"" if is_cut else random.randbytes(1) + content[position + 1 :]))
        refusal = what_loading_says(folder)
        assert refusal or not is_cut
        refusals.append(refusal)
        path.write_bytes(content)
    assert 20 < sum(map(bool, refusals)) < 120
    assert what_loading_says(folder) is None


def what_loading_says(folder: Path) -> str | None:
    """The sentence of a refusal."""
    try:
        load_network(folder)
    except (ValueError, OSError) as error:
        assert is_sentence(error)  # noqa: PT017
        assert not validate_drafter(folder).passed
        return str(error)
    return None


def test_a_folder_that_lost_a_shard_is_refused(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "d", published_tensors(target, make_network(target)), "model.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        load_network(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["fc.weight"]}')
    with pytest.raises(ValueError, match="has no weight_map of tensor names to files"):
        load_network(folder)


def test_integer_weights_and_doubled_names_are_refused(target: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors = published_tensors(target, make_network(target))
    quantised = {**tensors, "fc.weight": tensors["fc.weight"].to(torch.int8)}
    assert "fc.weight" in (text := refusal(write(tmp_path / "q", quantised), target))
    assert "is of int8; quantised drafters are not supported" in text
    doubled = {**tensors, "module.fc.weight": tensors["fc.weight"].clone()}
    assert "holds fc.weight twice, as fc.weight and module.fc.weight" in refusal(write(tmp_path / "t", doubled), target)
    foreign = {**tensors, "fc.weight": tensors["fc.weight"].to(torch.float8_e4m3fn)}
    assert "is of float8_e4m3fn; quantised drafters are not supported" in refusal(
        write(tmp_path / "f", foreign), target
    )


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"num_key_value_heads": 2.5}, "num_key_value_heads in .* must be a positive whole number, got 2.5"),
        ({"hidden_size": True}, "hidden_size in .* must be a positive whole number, got True"),
        ({"num_attention_heads": 0}, "num_attention_heads in .* must be a positive whole number, got 0"),
        ({"rope_theta": "500000"}, "rope_theta in .* must be a positive number, got '500000'"),
        ({"rope_scaling": [2.0]}, r"rope_scaling in .* must be an object or null, got \[2.0\]"),
        ({"rope_scaling": {"type": "linear"}}, "describes no network that can be built"),
        ({"hidden_act": "sily"}, "describes no network that can be built"),
        # transformers 4.57 builds that network, whose tensors then have other shapes than the file's
        (
            {"num_attention_heads": 6, "head_dim": 8},
            r"describes no network .* is not a multiple of|must be \[32, 48\] by",
        ),
        ({"num_key_value_heads": 3}, r"config\.json in .*: num_attention_heads must be a multiple of"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    overrides: Any, sentence: str, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    folder = write(tmp_path / "d", published_tensors(target, make_network(target)), published_config(**overrides))
    with pytest.raises(ValueError, match=sentence) as caught:
        load_network(folder)
    assert is_sentence(caught.value)


def test_a_full_disk_leaves_the_drafter_that_was_there(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = save(target, tmp_path / "d", make_network(target, 1))
    before, limits = files_in(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 500, len(before["d/model.safetensors"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                save(target, folder, make_network(target, 2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files_in(tmp_path) == before


def test_saving_removes_what_a_killed_process_left_of_the_same_drafter(
    target: LlamaForCausalLM, tmp_path: Path
) -> None:
    for name in (".d.0123abcd.tmp", ".d.5.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    save(target, tmp_path / "d", make_network(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.5.0123abcd.tmp", "d"], "d.5 is another drafter"


def test_where_directories_cannot_be_swapped_the_old_one_is_renamed_first(
    target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "_exchange", lambda *_: False)
    for seed in (1, 2, 3):
        network = make_network(target, seed)
        folder = save(target, tmp_path / "d", network)
        assert load_network(folder).fc.weight.equal(network.fc.weight)
        assert [path.name for path in tmp_path.iterdir()] == ["d"]
