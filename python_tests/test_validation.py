"""Validation: a good drafter passes every check, and each flaw fails the one that is about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_files import (
    H,
    Tensors,
    V,
    accelerate_state,
    make_network,
    make_target,
    prefixed,
    published_config,
    published_tensors,
    save,
    without,
    write,
)
from transformers import LlamaForCausalLM

from taps_ext import tiny
from taps_ext.checkpoints import ValidationReport, average_drafters, validate_drafter
from taps_ext.cli import main

PROVENANCE = {"objective": "hass", "target": "meta/Llama", "domain": "math"}


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return make_target()


@pytest.fixture(scope="module")
def target_folder(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "target"
    target.save_pretrained(folder)
    return folder


def statuses(report: ValidationReport) -> dict[str, str]:
    assert all("\n" not in check.message and check.message for check in report.checks)
    return {check.name: check.status for check in report.checks}


def flaws(report: ValidationReport) -> set[str]:
    return {name for name, status in statuses(report).items() if status == "failed"}


def test_a_saved_drafter_passes_every_check(target: LlamaForCausalLM, target_folder: Path, tmp_path: Path) -> None:
    report = validate_drafter(save(target, tmp_path / "d", make_network(target), PROVENANCE), target_folder)
    assert {name for name, status in statuses(report).items() if status != "ok"} == {"calibration"}
    expected = {"files", "config", "names", "shapes", "values", "target", "embedding"}
    assert expected <= statuses(report).keys()
    assert report.passed
    assert {name: bool(reasons) for name, reasons in report.loaders.items()} == {
        "eagle": False,
        "hass": False,
        "vllm": False,
        "sglang": True,
    }
    assert json.loads(json.dumps(report.to_dict()))["loaders"]["vllm"] == {"reads": True, "reasons": []}


def test_the_shipped_drafters_and_their_average_pass(tmp_path: Path) -> None:
    folders = list(tiny.drafter_paths().values())
    average = average_drafters(folders, None, tmp_path / "average")
    for folder, uncertain in (*((folder, set()) for folder in folders), (average, {"calibration"})):
        found = statuses(validate_drafter(folder, tiny.assets() / "target"))
        assert {name for name, status in found.items() if status != "ok"} == uncertain


def altered(change: Callable[[Tensors], Tensors], **overrides: Any) -> Callable[[LlamaForCausalLM, Path], Path]:
    """A published folder with some tensors changed, and its config."""

    def make(target: LlamaForCausalLM, folder: Path) -> Path:
        return write(folder, change(published_tensors(target, make_network(target))), published_config(**overrides))

    return make


def same(tensors: Tensors) -> Tensors:
    return tensors


def cut_off(target: LlamaForCausalLM, folder: Path) -> Path:
    weights = altered(same)(target, folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return folder


def one_bit_off(target: LlamaForCausalLM, folder: Path) -> Path:
    weights = save(target, folder, make_network(target)) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    return folder


FLAWS: dict[str, tuple[str, str, Callable[[LlamaForCausalLM, Path], Path]]] = {
    "cut off": ("files", "cannot be read as tensors", cut_off),
    "one bit": ("files", "is damaged or was changed: its SHA-256 is not the one in config.json", one_bit_off),
    "eagle 3": ("names", "EAGLE-3", altered(lambda tensors: {**tensors, "d2t": torch.zeros(3)})),
    "missing": ("names", "missing fc.weight; unexpected nothing", altered(lambda t: without(t, "fc.weight"))),
    "shape": ("shapes", "must be [32, 64] by its config, got", altered(lambda t: {**t, "fc.weight": torch.ones(H, H)})),
    "nan": ("values", "NaN or inf", altered(lambda t: {**t, "fc.weight": torch.full((H, 2 * H), torch.nan)})),
    "rope": ("target", "drafter rope theta 10000 differs", altered(same, rope_theta=10000.0)),
    "sizes": ("network", "does not give hidden_size", altered(same, hidden_size=None)),
    "layers": ("config", "num_hidden_layers in config.json is not 1", altered(same, num_hidden_layers=2)),
    "type": ("config", "model_type in config.json is qwen2, not llama", altered(same, model_type="qwen2")),
    "architecture": ("config", "architectures in config.json is None", altered(same, architectures=None)),
    "hidden theta": (
        "config",
        "rope_theta is not at the top of config.json",
        altered(same, rope_theta=None, rope_parameters={"rope_theta": 500000.0}),
    ),
    "bias claimed": ("config", "fc.bias is not inside, and config.json has bias true", altered(same, bias=True)),
    "bias by default": (
        "config",
        "fc.bias is not inside, and config.json has no bias key, which means true",
        altered(same, bias=None),
    ),
    "bias denied": (
        "config",
        "fc.bias is inside, and config.json has bias false",
        altered(lambda tensors: {**tensors, "fc.bias": torch.ones(H)}),
    ),
    "embedding": ("embedding", "differs from", altered(lambda t: {**t, "embed_tokens.weight": torch.ones(V, H)})),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_fails_the_check_that_is_about_it_and_no_other(
    flaw: str, target: LlamaForCausalLM, target_folder: Path, tmp_path: Path
) -> None:
    name, words, make = FLAWS[flaw]
    report = validate_drafter(make(target, tmp_path / "d"), target_folder)
    assert flaws(report) == {name}
    assert not report.passed
    assert words in next(check.message for check in report.checks if check.name == name)


def test_what_is_odd_but_works_is_a_warning(target: LlamaForCausalLM, target_folder: Path, tmp_path: Path) -> None:
    tensors = published_tensors(target, make_network(target))
    lm_head = {**tensors, "lm_head.weight": torch.ones(V, H)}
    bare = {**without(tensors, "embed_tokens.weight"), "fc.weight": tensors["fc.weight"].half()}
    for folder, expected in (
        (write(tmp_path / "published", tensors), {"provenance"}),
        (write(tmp_path / "head", lm_head), {"provenance", "extras"}),
        (write(tmp_path / "bare", bare), {"provenance", "extras", "dtype", "embedding"}),
        (write(tmp_path / "short", tensors, published_config(max_position_embeddings=8)), {"provenance", "context"}),
        (
            save(target, tmp_path / "rope", make_network(target, rope_scaling={"rope_type": "linear", "factor": 2.0})),
            {"provenance", "target"},
        ),
    ):
        report = validate_drafter(folder, target_folder)
        assert report.passed, report
        assert {name for name, status in statuses(report).items() if status == "warning"} == {"calibration", *expected}


def test_a_training_state_lacks_only_its_config(target: LlamaForCausalLM, target_folder: Path, tmp_path: Path) -> None:
    state = accelerate_state(tmp_path / "state", published_tensors(target, make_network(target)))
    (state / "config.json").unlink()
    assert flaws(validate_drafter(state, target_folder)) == {"config"}
    alone = validate_drafter(state)
    assert flaws(alone) == {"config", "network"}
    assert alone.loaders == {}


def test_a_rounded_embedding_is_the_targets(target: LlamaForCausalLM, target_folder: Path, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        folder = save(target, tmp_path / "d", make_network(target).to(dtype), PROVENANCE)
        checks = {check.name: check for check in validate_drafter(folder, target_folder).checks}
        assert checks["embedding"].message == "the target's, bit for bit"
    tensors = published_tensors(target, make_network(target))
    twice = tensors["embed_tokens.weight"].bfloat16().half()
    checks = {
        check.name: check
        for check in validate_drafter(
            write(tmp_path / "twice", {**tensors, "embed_tokens.weight": twice}), target_folder
        ).checks
    }
    assert (checks["embedding"].status, checks["embedding"].message) == ("ok", "the target's, up to rounding")


LOADER_REASONS: list[tuple[str, str, Callable[[LlamaForCausalLM, Path], Path]]] = [
    ("hass", "the embedding is not inside", altered(lambda tensors: without(tensors, "embed_tokens.weight"))),
    ("hass", "lm_head.weight is inside", altered(lambda t: {**t, "lm_head.weight": torch.ones(V, H)})),
    ("vllm", "lm_head.weight is inside", altered(lambda t: {**t, "lm_head.weight": torch.ones(V, H)})),
    ("vllm", "which it takes for biases of all four projections", altered(same, attention_bias=True)),
    ("vllm", "max_position_embeddings 8 is below the target's 2048", altered(same, max_position_embeddings=8)),
    ("vllm", "mlp_bias in config.json is true", altered(same, mlp_bias=True)),
    ("vllm", "the q, k and v biases and qkv_bias in config.json disagree", altered(same, qkv_bias=True)),
    ("eagle", "the q, k and v biases and qkv_bias in config.json disagree", altered(same, qkv_bias=True)),
    ("eagle", "the tensors are not under their published names", altered(lambda t: prefixed(t, "module."))),
    ("sglang", "architectures must be [LlamaForCausalLMEagle]", altered(same)),
]


@pytest.mark.parametrize("loader, reason, make", LOADER_REASONS)
def test_the_report_says_why_a_program_cannot_read_the_folder(
    loader: str,
    reason: str,
    make: Callable[[LlamaForCausalLM, Path], Path],
    target: LlamaForCausalLM,
    target_folder: Path,
    tmp_path: Path,
) -> None:
    report = validate_drafter(make(target, tmp_path / "d"), target_folder)
    assert any(reason in one for one in report.loaders[loader]), report.loaders[loader]


def test_a_target_that_cannot_be_read_is_no_verdict_on_the_drafter(target: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = save(target, tmp_path / "d", make_network(target))
    with pytest.raises(FileNotFoundError, match="no target at"):
        validate_drafter(folder, tmp_path / "nowhere")


def test_the_command_prints_a_report_and_fails_with_the_drafter(
    target: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["validate", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    code, out, err = run("tiny/math", "--target", "tiny")
    assert (code, err) == (0, "")
    assert "all finite" in out
    assert "[LlamaForCausalLMEagle]" in out
    code, out, err = run(one_bit_off(target, tmp_path / "d"), "--json")
    report = json.loads(out)
    assert (code, err, report["passed"]) == (1, "", False)
    assert report["checks"][0]["name"] == "files"
    assert run("tiny/math", "--target", tmp_path / "nowhere")[0] == 2
    assert run(tmp_path / "nowhere")[0] == 1
