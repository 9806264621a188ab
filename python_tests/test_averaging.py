"""Averages: exact to a rounding, and refused for drafters that do not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from drafter_files import (
    PUBLISHED_KEYS,
    Tensors,
    any_shape,
    config_of,
    files_in,
    make_network,
    make_target,
    network_of_shape,
    prefixed,
    published_tensors,
    save,
    save_shape,
    stored,
    without,
    write,
    write_sharded,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from taps_ext.checkpoints import average_drafters, load_drafter, load_network, save_drafter, sweep
from taps_ext.checkpoints.average import sweep_weights
from taps_ext.cli import main
from taps_ext.drafters import EagleNetwork

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return make_target()


def any_weights(random: Random, num_parents: int) -> list[float]:
    shares = [random.choice((0.0, random.random(), random.random())) for _ in range(num_parents - 1)]
    scale = random.random() / max(1.0, sum(shares))
    return [*(share * scale for share in shares), 1 - sum(share * scale for share in shares)]


def any_parents(random: Random, tmp_path: Path) -> tuple[list[Path], list[EagleNetwork]]:
    """Drafters of one random shape; some tensors are the same in all of them."""
    config, dtype = any_shape(random), random.choice(DTYPES)
    networks = [network_of_shape(config, seed) for seed in range(random.randint(2, 4))]
    for name in random.sample(list(networks[0].state_dict()), 3):
        for network in networks:
            network.state_dict()[name].copy_(networks[0].state_dict()[name])
    networks = [network.to(dtype) for network in networks]
    return [save_shape(tmp_path / f"d{i}", network) for i, network in enumerate(networks)], networks


@pytest.mark.parametrize("seed", range(30))
def test_an_average_is_the_float64_average_within_one_rounding_of_its_dtype(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    folders, networks = any_parents(random, tmp_path)
    weights = any_weights(random, len(folders))
    average = stored(average_drafters(folders, weights, tmp_path / "average"))
    parents = [stored(folder) for folder in folders]
    assert average.keys() == parents[0].keys() == {"embed_tokens.weight", *networks[0].state_dict()}
    for name, found in average.items():
        inputs = [parent[name] for parent in parents]
        assert found.dtype == inputs[0].dtype
        if all(inputs[0].equal(other) for other in inputs):
            assert found.equal(inputs[0]), "a tensor that is the same in all parents stays bit for bit"
        else:
            torch.testing.assert_close(found.double(), exact_average(inputs, weights), **one_rounding(inputs))
    assert load_network(tmp_path / "average").config == networks[0].config


def exact_average(inputs: list[Tensor], weights: list[float]) -> Tensor:
    terms = [weight * tensor.double() for weight, tensor in zip(weights, inputs, strict=True)]
    return torch.stack(terms).sum(0)


def one_rounding(inputs: list[Tensor]) -> dict[str, float]:
    """Half a unit in the last place of the dtype, and the float32 arithmetic before it: a rounding a parent and sum."""
    largest = max(float(tensor.abs().max()) for tensor in inputs)
    arithmetic = 2 * len(inputs) * torch.finfo(torch.float32).eps * largest
    return {"rtol": torch.finfo(inputs[0].dtype).eps / 2, "atol": arithmetic + torch.finfo(inputs[0].dtype).tiny}


def test_equal_weights_are_the_default_and_two_runs_give_equal_files(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folders = [save(target, tmp_path / f"d{seed}", make_network(target, seed)) for seed in range(3)]
    first = average_drafters(folders, None, tmp_path / "first")
    again = average_drafters(folders, [1 / 3] * 3, tmp_path / "again")
    assert files_in(first) == files_in(again)


def test_an_average_says_where_it_comes_from(target: LlamaForCausalLM, tmp_path: Path) -> None:
    facts = [{"objective": "eagle2", "target": "tiny", "domain": domain} for domain in ("math", "chat")]
    folders = [save(target, tmp_path / f"d{i}", make_network(target, i), fact) for i, fact in enumerate(facts)]
    folder = average_drafters(folders, [0.3, 0.7], tmp_path / "average")
    taps = config_of(folder)["taps"]
    digests = [config_of(parent)["taps"]["sha256"] for parent in folders]
    assert (taps["algorithm"], taps["weights"], taps["target"]) == ("average", [0.3, 0.7], "tiny")
    assert taps["parents"] == [{"name": f"d{i}", **facts[i], "sha256": digests[i]} for i in (0, 1)]
    assert stored(folder).keys() == PUBLISHED_KEYS
    load_drafter(folder, target)


def test_averages_of_averages_and_of_every_form_of_file(target: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors = [published_tensors(target, make_network(target, seed)) for seed in (1, 2)]
    ordinary = save(target, tmp_path / "ordinary", make_network(target, 1))
    forms = [
        write(tmp_path / "bin", tensors[1], name="pytorch_model.bin"),
        write_sharded(tmp_path / "shards", tensors[1], "model.safetensors"),
        write(tmp_path / "prefix", prefixed({**tensors[1], "lm_head.weight": torch.ones(1)}, "module.")),
    ]
    averages = [stored(average_drafters([ordinary, form], [0.25, 0.75], tmp_path / f"a{form.name}")) for form in forms]
    for average in averages:
        assert average.keys() == PUBLISHED_KEYS
        assert all(average[name].equal(averages[0][name]) for name in PUBLISHED_KEYS)
    twice = average_drafters([tmp_path / "abin", ordinary], None, tmp_path / "bin")
    assert config_of(twice)["taps"]["parents"][0]["algorithm"] == "average"


def test_an_average_may_replace_one_of_its_parents(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folders = [save(target, tmp_path / f"d{seed}", make_network(target, seed)) for seed in range(2)]
    expected = stored(average_drafters(folders, None, tmp_path / "average"))
    replaced = stored(average_drafters(folders, None, folders[0]))
    assert all(replaced[name].equal(expected[name]) for name in PUBLISHED_KEYS)


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.1:0.9:0.1", "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9"),
        ("0:1:0.25", "0 0.25 0.5 0.75 1"),
        ("0.2:0.5:0.2", "0.2 0.4"),
        ("0.50:0.5:1", "0.5"),
        ("1e-1:.3:0.10", "0.1 0.2 0.3"),
        ("0:1:1", "0 1"),
    ],
)
def test_a_sweep_names_its_weights_as_one_would_write_them(text: str, expected: str) -> None:
    assert [f"{weight:f}" for weight in sweep_weights(text)] == expected.split()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.5",
        "0.1:0.9",
        "0.1:0.9:0",
        "0.1:0.9:-0.1",
        "0.9:0.1:0.1",
        "0:1.5:0.5",
        "-0.5:1:0.5",
        "a:b:c",
        "0:nan:1",
        "0:1:inf",
        "0:1:1e-9",
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a sweep is start:stop:step with .* such as 0\.1:0\.9:0\.1, got '"):
        sweep(tmp_path / "a", tmp_path / "b", text, tmp_path / "out")
    assert files_in(tmp_path) == {}


def test_a_sweep_writes_an_average_a_weight_of_the_first_drafter(target: LlamaForCausalLM, tmp_path: Path) -> None:
    first, second = (save(target, tmp_path / f"d{seed}", make_network(target, seed)) for seed in range(2))
    written = sweep(first, second, "0:1:0.25", tmp_path / "sweep")
    assert [path.name for path in written] == ["0", "0.25", "0.5", "0.75", "1"]
    assert stored(written[4])["fc.weight"].equal(stored(first)["fc.weight"])
    assert stored(written[0])["fc.weight"].equal(stored(second)["fc.weight"])
    alone = average_drafters([first, second], [0.25, 0.75], tmp_path / "alone")
    assert files_in(written[1]) == files_in(alone)


def test_a_sweep_looks_at_all_its_folders_before_it_writes_one(target: LlamaForCausalLM, tmp_path: Path) -> None:
    first, second = (save(target, tmp_path / f"d{seed}", make_network(target, seed)) for seed in range(2))
    (tmp_path / "sweep" / "0.9").mkdir(parents=True)
    (tmp_path / "sweep" / "0.9" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"0\.9 holds other files \(notes\.txt\)"):
        sweep(first, second, "0.1:0.9:0.1", tmp_path / "sweep")
    assert files_in(tmp_path / "sweep") == {"0.9/notes.txt": b"mine"}


# --- refusals --------------------------------------------------------------------------------------------------------


def changed(target: LlamaForCausalLM, folder: Path, **overrides: Any) -> Path:
    return save(target, folder, make_network(target, **overrides))


def other_embedding(target: LlamaForCausalLM, folder: Path) -> Path:
    weight = target.get_input_embeddings().weight.detach().clone()
    weight[3, 4] += 1e-3
    return save_drafter(make_network(target), folder, embedding=weight, target_config=target.config)


def with_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[LlamaForCausalLM, Path], Path]:
    return lambda target, folder: write(folder, change(published_tensors(target, make_network(target))))


UNLIKE: dict[str, Callable[[LlamaForCausalLM, Path], Path]] = {
    "differ in fc_bias; only drafters of one shape": lambda t, f: changed(t, f, fc_bias=True),
    "differ in qkv_bias; only drafters of one shape": lambda t, f: changed(t, f, qkv_bias=True),
    "differ in rope_theta; only drafters of one shape": lambda t, f: changed(t, f, rope_theta=10000.0),
    "differ in rope_scaling": lambda t, f: changed(t, f, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "differ in intermediate_size": lambda t, f: changed(t, f, intermediate_size=40),
    "differ in num_key_value_heads": lambda t, f: changed(t, f, num_key_value_heads=4),
    "differ in vocab_size": lambda t, f: changed(make_target(vocab_size=62), f),
    "differ in hidden_size, intermediate_size, head_dim": lambda t, f: changed(
        make_target(hidden_size=64, intermediate_size=128), f
    ),
    "are drafters of the targets meta/Llama-B and here/Llama-A; only": lambda t, f: save(
        t, f, make_network(t), {"target": "meta/Llama-B"}
    ),
    "hold different embeddings, so their targets differ": other_embedding,
    r"hold fc\.weight in float16 and float32; export both with one --dtype": with_tensors(
        lambda tensors: {**tensors, "fc.weight": tensors["fc.weight"].half()}
    ),
    r"do not both hold embed_tokens\.weight; export both with --target": with_tensors(
        lambda tensors: without(tensors, "embed_tokens.weight")
    ),
    r"is not an EAGLE-2 drafter: missing fc\.weight": with_tensors(lambda tensors: without(tensors, "fc.weight")),
    "holds an EAGLE-3 drafter": with_tensors(lambda tensors: {**tensors, "d2t": torch.zeros(3)}),
    "holds NaN or infinite values": with_tensors(lambda tensors: {**tensors, "fc.weight": tensors["fc.weight"] / 0}),
}


@pytest.mark.parametrize("sentence", UNLIKE)
def test_unlike_drafters_are_refused_before_anything_is_written(
    sentence: str, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    first = save(target, tmp_path / "first", make_network(target), {"target": "here/Llama-A"})
    other = UNLIKE[sentence](target, tmp_path / "other")
    before = files_in(tmp_path)
    for run in (
        lambda: average_drafters([first, first, other], None, tmp_path / "out"),
        lambda: sweep(first, other, "0:1:0.5", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "first, second",
    [
        ("meta/Llama-3", "/models/Llama-3/"),
        ({"name": "meta/Llama-3", "commit": "a"}, {"name": "Llama-3"}),
        ({"name": "meta/Llama-3", "fingerprint": "f"}, {"name": "my-copy", "fingerprint": "f"}),
        ("meta/Llama-3", None),
    ],
)
def test_one_target_may_have_several_names(first: Any, second: Any, target: LlamaForCausalLM, tmp_path: Path) -> None:
    folders = [
        save(target, tmp_path / f"d{i}", make_network(target, i), {"target": name})
        for i, name in enumerate((first, second))
    ]
    assert config_of(average_drafters(folders, None, tmp_path / "out"))["taps"]["target"] == first


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [0.5], [0.5, 0.4], [1.5, -0.5], [float("nan"), 0.5], [0.5, 0.25, 0.25]]
)
def test_weights_that_make_no_average_are_refused(
    weights: list[float], target: LlamaForCausalLM, tmp_path: Path
) -> None:
    folders = [save(target, tmp_path / f"d{seed}", make_network(target, seed)) for seed in range(2)]
    with pytest.raises(ValueError, match=r"weights within 0 and 1 that sum to 1, got 2 drafters and the weights \["):
        average_drafters(folders, weights, tmp_path / "out")
    with pytest.raises(ValueError, match="at least 2 drafters"):
        average_drafters(folders[:1], [1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command -----------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = exit.value.code
    assert code is None or isinstance(code, int)
    return code or 0, captured.out, captured.err


def test_the_command_averages_and_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def weights(folder: str) -> list[float]:
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert [parent["name"] for parent in config["taps"]["parents"]] == ["math", "chat"]
        return list(config["taps"]["weights"])

    pair = ("average", "tiny/math", "tiny/chat", "--output")
    code, out, _ = command(capsys, *pair, tmp_path / "one", "--weight", "0.25")
    assert (code, out, weights("one")) == (0, f"wrote {tmp_path / 'one'}\n", [0.25, 0.75])
    command(capsys, *pair, tmp_path / "two", "--weight", "0.2", "--weight", "0.8")
    command(capsys, *pair, tmp_path / "equal")
    assert (weights("two"), weights("equal")) == ([0.2, 0.8], [0.5, 0.5])
    code, out, _ = command(capsys, *pair, tmp_path / "sweep", "--sweep", "0.1:0.9:0.4")
    assert (code, [Path(line).name for line in out.split() if line != "wrote"]) == (0, ["0.1", "0.5", "0.9"])
    assert weights("sweep/0.9") == [0.9, 0.1]


def test_the_command_refuses_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (("tiny/math", "tiny/chat", "--weight", "0.5", "--sweep", "0:1:0.5"), "--sweep takes two drafters and no"),
        (("tiny/math", "tiny/chat", "--weight", "2"), "that sum to 1, got 2 drafters and the weights [2.0, -1.0]"),
        (("tiny/math", tmp_path / "nowhere"), "no drafter at"),
        (("tiny/math", "tiny/nobody"), "there is no embedded drafter tiny/nobody"),
    ):
        code, out, err = command(capsys, "average", *arguments, "--output", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert sentence in err
    assert not (tmp_path / "out").exists()
