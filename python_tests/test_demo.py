"""The demonstration on the embedded models, small enough for a test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from taps_ext import tiny
from taps_ext.checkpoints.files import json_text
from taps_ext.cli import main
from taps_ext.cli.demo import CONTROL, MERGED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    """What a short `taps-ext demo` writes."""
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--limit", "2", "--max-new-tokens", "24", "--output", str(folder), "--json"])
    assert not exit.value.code
    return json.loads((folder / "demo.json").read_text())


def test_every_text_of_every_variant_equals_plain_decoding(result: dict) -> None:
    assert {(cell["num_identical"], cell["num_prompts"]) for cell in result["cells"]} == {(2, 2)}


def test_the_table_holds_every_variant_on_every_domain(result: dict) -> None:
    cells = {(cell["variant"], cell["domain"]) for cell in result["cells"]}
    singles = {f"single {name}" for name in tiny.drafter_paths()}
    routed = {"confidence", "entropy", "evidence"}
    merged = {"merged, 60 nodes, no evidence", "merged, 60 nodes", MERGED}
    variants = singles | routed | merged | {"averaged weights", CONTROL}
    assert cells == {(variant, domain) for variant in variants for domain in tiny.DOMAINS}


def test_the_control_may_use_as_many_nodes_as_the_union_has(result: dict) -> None:
    nodes = {(cell["variant"], cell["domain"]): cell["nodes_per_step"] for cell in result["cells"]}
    for domain in tiny.DOMAINS:
        assert 60 < nodes[CONTROL, domain] <= round(nodes[MERGED, domain])
        assert nodes["merged, 60 nodes", domain] <= 60


def test_a_variant_takes_fewer_target_forwards_than_tokens(result: dict) -> None:
    merged = [cell for cell in result["cells"] if cell["variant"] == MERGED]
    assert all(cell["target_forwards_per_token"] < 1 < cell["acceptance_length"] for cell in merged)


def test_the_samples_spell_out_the_text_and_name_its_proposers(result: dict) -> None:
    for sample in result["samples"]:
        proposers = {name for span in sample["spans"] for name in span["proposers"]}
        assert sample["prompt"]
        assert proposers <= set(tiny.drafter_paths())
        assert proposers


def test_the_figures_are_there_and_nothing_half_written(result: dict, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json"]
    assert all(1 <= len(cell["acceptance_by_depth"]) <= 6 for cell in result["cells"])


def test_the_table_begins_with_tokens_per_second_and_shows_the_same_headline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--limit", "1", "--max-new-tokens", "12", "--output", str(tmp_path)])
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads((tmp_path / "demo.json").read_text())
    row = next(line for line in out.splitlines() if line.startswith("merged  "))
    merged = [cell for cell in result["cells"] if cell["variant"] == MERGED]
    assert all(f"{cell['acceptance_length']:.2f}" in row for cell in merged)
    speeds = [(cell["tokens_per_second"], cell["plain_tokens_per_second"]) for cell in merged]
    assert row.split()[1:5] == [text for own, plain in speeds for text in (f"{own:.0f}", f"{own / plain:.2f}x")]
    assert re.search("tokens/s.*acceptance.*forwards.*nodes", out.splitlines()[0])
    assert "texts equal plain decoding's, token by token" in out


def test_an_empty_mean_becomes_null_in_json() -> None:
    assert json.loads(json_text({"mean": float("nan"), "by_depth": [0.5, float("inf")]})) == {
        "mean": None,
        "by_depth": [0.5, None],
    }
