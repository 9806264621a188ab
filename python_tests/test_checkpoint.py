"""Drafter checkpoints: every published form loads, what does not fit is refused in a sentence, saving is exact."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taps_ext.drafters import (
    EagleConfig,
    EagleNetwork,
    average_drafters,
    load_drafter,
    load_drafters,
    load_network,
    save_drafter,
)

V, H = 61, 32
PUBLISHED_KEYS = {
    "embed_tokens.weight",
    "fc.weight",
    *(f"layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "layers.0.post_attention_layernorm.weight",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def make_target(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": H,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": V,
        "rope_theta": 500000.0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return make_target()


def make_network(target: LlamaForCausalLM, seed: int = 1, **overrides: Any) -> EagleNetwork:
    torch.manual_seed(seed)
    return EagleNetwork(EagleConfig.for_target(target.config, **overrides))


def published_tensors(target: LlamaForCausalLM, network: EagleNetwork) -> Tensors:
    embedding = target.get_input_embeddings().weight.detach().clone()
    return {"embed_tokens.weight": embedding, **{key: value.clone() for key, value in network.state_dict().items()}}


def published_config(**overrides: Any) -> dict[str, Any]:
    """A config.json as the published repositories have it: 4.x spellings, no head_dim, `bias` false."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": V,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "torch_dtype": "float16",
        "bias": False,
        "transformers_version": "4.28.1",
    }
    return {key: value for key, value in {**config, **overrides}.items() if value is not None}


def write(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, name: str = "model.safetensors"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or published_config()))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


def write_sharded(folder: Path, tensors: Tensors, name: str) -> Path:
    """Two shards and their index, as transformers writes them."""
    stem, suffix = name.rsplit(".", 1)
    shards = {key: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, key in enumerate(tensors)}
    for shard in set(shards.values()):
        write(folder, {key: tensors[key] for key, home in shards.items() if home == shard}, name=shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: value for key, value in tensors.items()}


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key not in keys}


def accelerate_state(folder: Path, tensors: Tensors) -> Path:
    torch.save({"weight": torch.zeros(V, H)}, write(folder, tensors, name="pytorch_model.bin") / "pytorch_model_1.bin")
    (folder / "optimizer.bin").write_bytes(b"not read")
    return folder


# --- loading -------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Path, Tensors], Path]] = {
    "safetensors": lambda folder, tensors: write(folder, tensors),
    "bin": lambda folder, tensors: write(folder, tensors, name="pytorch_model.bin"),
    "sharded safetensors": lambda folder, tensors: write_sharded(folder, tensors, "model.safetensors"),
    "sharded bin": lambda folder, tensors: write_sharded(folder, tensors, "pytorch_model.bin"),
    "no embedding": lambda folder, tensors: write(folder, without(tensors, "embed_tokens.weight")),
    "accelerate state": accelerate_state,
    "module. prefix": lambda folder, tensors: write(folder, prefixed(tensors, "module.")),
    "ea_layer. prefix": lambda folder, tensors: write(folder, prefixed(tensors, "model.ea_layer.")),
    "rotary buffers": lambda folder, tensors: write(
        folder, {**tensors, "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, name="pytorch_model.bin"
    ),
    "bias claimed, none inside": lambda folder, tensors: write(folder, tensors, published_config(bias=True)),
    "no bias key": lambda folder, tensors: write(folder, tensors, published_config(bias=None)),
    "both files": lambda folder, tensors: write(
        write(folder, {"junk": torch.zeros(1)}, name="pytorch_model.bin"), tensors
    ),
    "5.x spellings": lambda folder, tensors: write(
        folder,
        tensors,
        published_config(rope_theta=None, torch_dtype=None, dtype="float16", rope_parameters={"rope_theta": 500000.0}),
    ),
}


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
    assert load_drafter(folder, SimpleNamespace(model=target)).embedding is target.get_input_embeddings()
    with pytest.raises(ValueError, match="must be a transformers model or a TargetModel, got str"):
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
    with pytest.warns(UserWarning, match="the embedding in .* differs from the target's"):
        load_drafter(write(tmp_path / "e", {**tensors, "embed_tokens.weight": torch.ones(V, H)}), target)
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

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_drafter("owner/drafter", target).name == "drafter"
    assert [repo_id for repo_id, _ in asked] == ["owner/drafter"]
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
    assert "names shards outside of its folder" in refusal(folder, target)


def test_missing_places_are_named(target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id such as owner/name"):
        load_drafter(tmp_path / "nowhere", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*: none of model\.safetensors"):
        load_drafter(tmp_path / "empty", target)

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"the hub gave no drafter of that name \(no route\); give a folder"):
        load_drafter("owner/drafter", target)


# --- saving and averaging --------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\); give a new folder"):
        save(tmp_path / "d", 3)


def test_an_embedding_of_another_shape_is_not_saved(target: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the embedding must be \[61, 32\], got \[60, 32\]"):
        save_drafter(make_network(target), tmp_path / "d", embedding=torch.zeros(60, H), target_config=target.config)


def saved_pair(target: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype) -> tuple[list[Path], list[EagleNetwork]]:
    networks = [make_network(target, seed).to(dtype) for seed in (1, 2)]
    folders = [
        save_drafter(
            network,
            tmp_path / f"d{i}",
            embedding=target.get_input_embeddings(),
            target_config=target.config,
            metadata={"domain": f"domain {i}"},
        )
        for i, network in enumerate(networks)
    ]
    return folders, networks


def test_an_average_is_computed_in_float32_and_keeps_equal_tensors(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folders, networks = saved_pair(target, tmp_path, torch.bfloat16)
    folder = average_drafters(folders, [0.3, 0.7], tmp_path / "average")
    stored, (first, second) = load_file(folder / "model.safetensors"), (network.state_dict() for network in networks)
    assert stored.keys() == PUBLISHED_KEYS
    assert stored["embed_tokens.weight"].equal(target.get_input_embeddings().weight.to(torch.bfloat16))
    for key in first:
        exact = 0.3 * first[key].double() + 0.7 * second[key].double()
        torch.testing.assert_close(stored[key].double(), exact, rtol=2**-8, atol=1e-9)
    taps = json.loads((folder / "config.json").read_text())["taps"]
    assert taps["weights"] == [0.3, 0.7]
    assert taps["parents"] == [{"name": "d0", "domain": "domain 0"}, {"name": "d1", "domain": "domain 1"}]
    load_drafter(folder, make_target().to(torch.bfloat16))


def test_averages_of_unlike_drafters_are_refused(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folders, _ = saved_pair(target, tmp_path, torch.float32)
    embedding = target.get_input_embeddings()
    for name, overrides in (("bias", {"fc_bias": True}), ("rope", {"rope_theta": 10000.0})):
        network = make_network(target, **overrides)
        save_drafter(network, tmp_path / name, embedding=embedding, target_config=target.config)
    with pytest.raises(ValueError, match="differ in fc_bias; only drafters of one shape can be averaged"):
        average_drafters([folders[0], tmp_path / "bias"], None, tmp_path / "out")
    with pytest.raises(ValueError, match="differ in rope_theta"):
        average_drafters([folders[0], tmp_path / "rope"], None, tmp_path / "out")
    with pytest.raises(ValueError, match=r"weights that sum to 1, got 2 drafters and the weights \[1.0, 1.0\]"):
        average_drafters(folders, [1.0, 1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
