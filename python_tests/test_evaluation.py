"""The evaluation: its variants, its lines, its folder; on the embedded models, with few short answers."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from taps_ext import tiny
from taps_ext.checkpoints import load_drafter, load_drafters
from taps_ext.decode.budget import CostTable
from taps_ext.decode.decoder import SpeculativeDecoder
from taps_ext.decode.state import StepEvent
from taps_ext.evaluation import contestants, results, steps
from taps_ext.evaluation.plan import Plan, Settings, batches
from taps_ext.evaluation.prompting import Prompter
from taps_ext.evaluation.runner import evaluate
from taps_ext.evaluation.summary import summarise
from taps_ext.evaluation.tasks import TASKS, Question
from taps_ext.evaluation.variants import Variant, parse_variants
from taps_ext.sampling import SamplingParams, row_seed
from taps_ext.target.model import TargetModel
from taps_ext.tree import TreeShape

SHORT = Settings(max_new_tokens=6, batch_size=2, seed=5)
SPECS = ("confidence", "merged", "merged@8", "average")
TWO_TURNS = (
    Question("a", "one", ("Liam has 4 eggs and buys 3 more. How many eggs are there?",), ("7",)),
    Question("b", "two", ("Why should I label the cables?", "What goes wrong most often?"), ("x", "y")),
    Question("c", "two", ("Rosa fills 3 trays of 5.", "And with 2 more?"), None),
)


@cache
def models() -> tuple[Any, Any]:
    return tiny.load_target()


def folders() -> dict[str, Path]:
    return tiny.drafter_paths()


def run(folder: Path, tasks: Mapping[str, Sequence[Question]], specs: Sequence[str] = SPECS, **given: Any) -> None:
    """An evaluation of the embedded models; by default at both temperatures."""
    options: dict[str, Any] = {"temperatures": (0.0, 1.0), "settings": SHORT, "drafters": folders(), **given}
    model, tokenizer = options.pop("models", None) or models()
    temperatures, settings, drafters = (options.pop(name) for name in ("temperatures", "settings", "drafters"))
    variants = parse_variants(specs, list(drafters), temperatures, settings.max_nodes)
    facts = contestants.drafter_facts(contestants.check_drafters(drafters, model.config), drafters)
    more = {name: options.pop(name) for name in ("label", "costs") if name in options}
    plan = Plan(tasks, variants, temperatures, settings, facts, options.pop("sources", {}), **more)
    evaluate(model, tokenizer, drafters, plan, folder, **options)


def read(folder: Path) -> list[dict[str, Any]]:
    return list(results.read_lines(folder))


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what may differ from run to run."""
    line = copy.deepcopy(line)
    del line["tstamp"], line["choices"][0]["wall_time"]
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of both kinds of question; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    tiny_questions = TASKS["tiny_math"].load(limit=2)
    run(folder, {"tiny_math": tiny_questions, "prompts": TWO_TURNS}, target_name="tiny", label="mine")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed; `again` goes on in it."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


def again(folder: Path, **changes: Any) -> None:
    tasks = {"tiny_math": TASKS["tiny_math"].load(limit=2), "prompts": TWO_TURNS}
    run(folder, changes.pop("tasks", tasks), **{"target_name": "tiny", "label": "mine", **changes})


# ---- variants


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("single:chat", Variant("single:chat", "single", ("chat",), 60)),
        ("mine=single:chat@24,topk", Variant("mine", "single", ("chat",), 24, "topk")),
        ("average", Variant("average", "average", ("math", "chat"), 60)),
        ("w=average:chat+math,weight=0.3", Variant("w", "average", ("chat", "math"), 60, weight=0.3)),
        ("average:chat+math,weight=0.5", Variant("average:chat+math,weight=0.5", "average", ("chat", "math"), 60)),
        ("confidence@30", Variant("confidence@30", "confidence", ("math", "chat"), 30)),
        ("entropy", Variant("entropy", "entropy", ("math", "chat"), 60)),
        ("evidence", Variant("evidence", "evidence", ("math", "chat"), 60, evidence_decay=0.95)),
        ("evidence,evidence=0.9", Variant("evidence,evidence=0.9", "evidence", ("math", "chat"), 60, "coupled", 0.9)),
        ("merged", Variant("merged", "merged", ("math", "chat"), None, evidence_decay=0.0)),
        ("merged,auto", Variant("merged,auto", "merged", ("math", "chat"), 64, evidence_decay=0.0, adapts=True)),
        ("single:chat@9,auto", Variant("single:chat@9,auto", "single", ("chat",), 9, adapts=True)),
        ("merged,evidence=0.9", Variant("merged,evidence=0.9", "merged", ("math", "chat"), None, "coupled", 0.9)),
        ("merged@60", Variant("merged@60", "merged", ("math", "chat"), 60, evidence_decay=0.95)),
        ("a, b=merged@60,evidence=0", Variant("a, b", "merged", ("math", "chat"), 60, evidence_decay=0.0)),
    ],
)
def test_a_spec_says_what_a_variant_does(spec: str, expected: Variant) -> None:
    assert parse_variants([spec], ["math", "chat"], [0, 1], 60) == [Variant("plain", "plain"), expected]


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        (["singel:math"], "composition of plain, single, average, confidence"),
        (["x=singel:math"], "composition of plain"),
        (["single:maths"], "no drafter 'maths'; there are math, chat"),
        (["single"], "single takes one drafter"),
        (["single:math+chat"], "single takes one drafter"),
        (["confidence:math"], "two drafters or more"),
        (["merged:math+math"], "named twice"),
        (["merged@"], "nodes of a tree, 2 or more"),
        (["merged@1"], "nodes of a tree, 2 or more"),
        (["single:math,topp"], "an option is"),
        (["single:math,topk=1"], "an option is"),
        (["single:math,auto=1"], "an option is"),
        (["evidence,evidence"], "an option is"),
        (["single:math,evidence=0.5"], "goes with evidence and merged"),
        (["merged,evidence=x"], "followed by a number"),
        (["merged,evidence=1.5"], "at most 1"),
        (["evidence,evidence=0"], "above 0"),
        (["merged,weight=0.5"], "average of two drafters"),
        (["average,weight=1.5"], "average of two drafters"),
        (["average,weight=nan"], "average of two drafters"),
        (["merged,evidence=0.9,evidence=0.8"], "given twice"),
        (["plain@60"], "plain decoding takes no"),
        (["=plain"], "label before = is empty"),
        (["single:math", "single:math@60"], "'single:math' and 'single:math@60' are the same"),
        (["merged", "u=merged,evidence=0"], "are the same"),
        (["average", "average,topk"], "are the same"),
        (["plain", "x=plain"], "are the same"),
        (["x=single:math", "x=single:chat"], "have the label 'x'"),
    ],
)
def test_what_is_no_variant_is_refused_in_a_sentence(specs: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        parse_variants(specs, ["math", "chat"], [0, 1], 60)


def test_a_topk_variant_runs_with_noise_only_and_is_refused_without_any() -> None:
    *_, topk = parse_variants(["single:math,topk"], ["math"], [0, 1], 60)
    assert topk.runs_at(1) and not topk.runs_at(0)
    with pytest.raises(ValueError, match="no other variant at temperature 0"):
        parse_variants(["single:math,topk"], ["math"], [0], 60)


def test_the_default_list_holds_every_composition_at_both_budgets_and_topk_where_there_is_noise() -> None:
    labels = [variant.label for variant in parse_variants([], ["a", "b"], [0], 40)]
    compared = ["plain", "single:a", "single:b", "average", "confidence", "entropy", "evidence"]
    compared += ["merged", "merged@40", "merged@40,evidence=0"]
    assert labels == compared
    sampled = [variant.label for variant in parse_variants([], ["a", "b"], [0, 1], 40)]
    assert sampled == [*compared, "single:a,topk", "single:b,topk", "confidence,topk", "merged,topk"]
    assert [variant.label for variant in parse_variants([], ["a"], [0], 40)] == ["plain", "single:a"]


def test_drafters_without_weights_take_part_in_all_but_averages() -> None:
    def labels(*names: str) -> list[str]:
        return [variant.label for variant in parse_variants([], names, [0], 40, ["lookup"])]

    assert "average" in labels("a", "b", "lookup")
    assert "average" not in labels("a", "lookup") and "merged" in labels("a", "lookup")
    *_, average = parse_variants(["average"], ["a", "lookup", "b"], [0], 40, ["lookup"])
    assert average.drafters == ("a", "b")


def test_plain_comes_first_and_names_that_specs_cannot_hold_are_refused() -> None:
    assert [one.label for one in parse_variants(["single:a", "p=plain"], ["a"], [0], 60)] == ["p", "single:a"]
    with pytest.raises(ValueError, match="may not be empty or hold"):
        parse_variants([], ["a+b", "c"], [0], 60)


def test_each_variant_gets_the_decoder_that_its_spec_says() -> None:
    model = TargetModel(models()[0])
    specs = ["merged@20", "merged", "evidence,evidence=0.5", "single:chat@9,topk", "average:chat+math,weight=1"]
    variants = parse_variants(specs, ["math", "chat"], [1], 33)
    participants = contestants.load_participants(model, folders(), variants)
    made = contestants.make_contestants(
        model, variants, participants, Settings(depth=3, branching=4, max_nodes=33), None
    )
    plain, budgeted, union, evidence, single, average = [one.decoder for one in made]
    assert plain is None and budgeted and union and evidence and single and average
    assert {decoder.shape.depth for decoder in (budgeted, union, evidence, single, average)} == {3}
    assert [decoder.shape.max_nodes for decoder in (budgeted, union, evidence, single, average)] == [20, 33, 33, 9, 33]
    assert [decoder.composition.decay for decoder in (budgeted, union, evidence)] == [0.95, None, 0.5]
    assert [budgeted.composition.max_nodes, union.composition.max_nodes] == [20, None]
    assert [decoder.drafting for decoder in (budgeted, single, average)] == ["coupled", "topk", "topk"]
    assert list(single.drafters) == ["chat"] and made[5].proposers == ("average",)
    all_chat = load_drafter(folders()["chat"], model).network.state_dict()
    weights = average.drafters["average"].network.state_dict()
    assert all(torch.allclose(weights[name], all_chat[name], atol=1e-2) for name in weights)


# ---- trees that adapt

ADAPTING = ("merged,auto", "single:math@12,auto")
CHEAP, DEAR = (
    CostTable((1, 4, 8, 16, 32), tuple(10 + k * ms for k in (0, 1, 2, 4, 8)), {"math": (ms, ms), "chat": (ms, ms)}, 4)
    for ms in (0.8, 3.0)
)


def adapting(folder: Path, **given: Any) -> list[dict[str, Any]]:
    """The lines of a run whose variants adapt, without times."""
    options = {"settings": replace(SHORT, max_new_tokens=16), "temperatures": (1.0,), **given}
    run(folder, {"tiny_math": TASKS["tiny_math"].load(limit=3)}, ADAPTING, **options)
    return [timeless(line) for line in read(folder)]


def nodes(lines: Sequence[dict[str, Any]]) -> list[int]:
    return [count for line in lines if line["variant"] != "plain" for count in line["turns"][0]["num_nodes"]]


def test_one_table_of_costs_gives_one_set_of_trees_and_lengths(tmp_path: Path) -> None:
    tables = {"a": CHEAP, "b": CHEAP, "c": DEAR}
    first, again, other = (adapting(tmp_path / name, costs=costs) for name, costs in tables.items())
    assert first == again
    cells = [summarise(tmp_path / name).cells for name in tables]
    assert cells[0] == cells[1] and all(cell.num_equal == cell.num_questions for cell in cells[2].values())
    assert len(set(nodes(first))) > 2 and sum(nodes(other)) < sum(nodes(first)), "costs matter, not the text"
    assert max(nodes([line for line in first if "@12" in line["variant"]])) <= 12
    kept = json.loads((tmp_path / "a" / "run.json").read_text())
    assert CostTable.from_dict(kept["costs"]) == CHEAP and kept["variants"]["merged,auto"]["adapts"]


def test_costs_are_measured_once_and_a_run_that_goes_on_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[set[str], int]] = []

    def measure(decoder: SpeculativeDecoder, batch_size: int) -> CostTable:
        measured.append((set(decoder.drafters), batch_size))
        return (CHEAP, DEAR)[len(measured) - 1]

    monkeypatch.setattr(SpeculativeDecoder, "cost_table", lambda self, size: self.costs or measure(self, size))
    lines = adapting(tmp_path)
    file = tmp_path / "answers-0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    assert adapting(tmp_path) == adapting(tmp_path, costs=CHEAP) == lines
    assert measured == [({"math", "chat"}, 2)]
    with pytest.raises(ValueError, match=r"another configuration: costs\.step_ms is "):
        adapting(tmp_path, costs=DEAR)


def test_costs_without_a_variant_that_adapts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="costs is for variants that adapt; give one, such as merged,auto"):
        run(tmp_path / "out", {"prompts": TWO_TURNS}, costs=CHEAP)
    assert not (tmp_path / "out").exists()


def test_nodes_that_continue_the_text_are_the_extensions_and_texts_stay(tmp_path: Path) -> None:
    settings = replace(SHORT, max_new_tokens=24, extend=True)
    tasks = {"tiny_chat": TASKS["tiny_chat"].load(limit=2)}
    run(tmp_path, tasks, ("single:chat@6", "merged,auto"), settings=settings, costs=CHEAP, temperatures=(0.0,))
    lines = [line for line in read(tmp_path) if line["variant"] != "plain"]
    assert all(line["drafters"][-1] == "extension" and line["turns"][0]["equals_plain"] for line in lines)
    accepted = [
        line["drafters"][mask.bit_length() - 1]
        for line in lines
        for step in line["turns"][0]["proposers"]
        for mask in step
    ]
    assert {"extension", "chat"} <= {*accepted}
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["extend"]


# ---- steps


def events_of(decoder: SpeculativeDecoder, temperature: float) -> tuple[list[StepEvent], Any]:
    _, tokenizer = models()
    questions = [*TASKS["tiny_math"].load(limit=2), *TASKS["tiny_chat"].load(limit=2)]
    prompts = [Prompter(tokenizer).encode(question, []) for question in questions]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    stream = decoder.stream(ids, (ids > 0).long(), sampling=SamplingParams(temperature), max_new_tokens=[4, 20, 12, 1])
    events: list[StepEvent] = []
    while True:
        try:
            events.append(next(stream))
        except StopIteration as end:
            return events, end.value


def by_hand(events: Sequence[StepEvent], row: int, drafter: int) -> dict[tuple[str, str], list[float]]:
    """Confidences and entropies of a row's nodes that a drafter proposed, node by node."""
    found: dict[tuple[str, str], list[float]] = {
        (signal, outcome): [] for signal in ("confidence", "entropy") for outcome in ("accepted", "rejected")
    }
    for event in events:
        if event.tree is None or event.path is None or event.num_accepted[row] is None:
            continue
        path = event.path[row].tolist()
        for node in range(1, int(event.tree.num_nodes[row])):
            assert event.tree.proposers is not None
            if int(event.tree.proposers[row, node]) >> drafter & 1:
                outcome = "accepted" if node in path else "rejected"
                found["confidence", outcome].append(math.exp(float(event.tree.scores[row, node])))
                if event.tree.entropies is not None:
                    found["entropy", outcome].append(float(event.tree.entropies[row, node]))
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("composition", ["confidence", "merged"])
def test_counts_and_histograms_are_those_of_a_count_node_by_node(composition: str, temperature: float) -> None:
    model, _ = models()
    decoder = SpeculativeDecoder(model, load_drafters(folders(), model), composition, shape=TreeShape(4, 5, 18))
    events, result = events_of(decoder, temperature)
    rows, signals = steps.analyse(events, 4, 2)
    told = signals.to_dicts(["math", "chat"])
    for row in range(4):
        assert rows[row].num_accepted == result.stats.num_accepted[row]
        assert rows[row].num_nodes == result.stats.num_nodes[row]
        names = [tuple(map(result.stats.names, masks)) for masks in rows[row].proposers]
        assert names == result.stats.accepted_proposers[row]
        chosen = result.stats.choices[row] if composition == "confidence" else [None] * len(rows[row].chosen)
        assert rows[row].chosen == chosen
        proposed = 0
        for index, drafter in enumerate(("math", "chat")):
            hands = by_hand(events, row, index)
            proposed += sum(len(hands["confidence", outcome]) for outcome in ("accepted", "rejected"))
            for (signal, outcome), values in hands.items():
                cell = told[row][drafter][signal][outcome]
                place = (lambda c: 100 * c ** (1 / 3)) if signal == "confidence" else (lambda h: 10 * h)
                bins = Counter(str(min(99, math.floor(place(value)))) for value in values)
                assert cell["count"] == len(values) == sum(cell["bins"].values())
                assert cell["sum"] == pytest.approx(sum(values), abs=1e-4)
                # float32 and float64 may fall on two sides of a bin's edge
                assert sum((Counter(cell["bins"]) - bins).values()) <= 1 + len(values) // 100
        assert sum(rows[row].num_proposed) == proposed
    assert rows[3].num_accepted == [] and max(rows[1].num_accepted) >= 2, "a row that ends at once, and one with drafts"
    assert any(mask == 3 for step in rows[1].proposers for mask in step) == (composition == "merged")


def test_bins_are_finer_towards_no_confidence_and_the_last_ones_are_open() -> None:
    assert steps.bin_of_confidence(torch.tensor([0.0, 9e-7, 0.0011, 0.126, 1.0])).tolist() == [0, 0, 10, 50, 99]
    assert steps.bin_of_entropy(torch.tensor([0.0, 0.11, 2.55, 9.95, 30.0])).tolist() == [0, 1, 25, 99, 99]


# ---- lines


def test_a_line_holds_what_the_decoder_did(finished: Path) -> None:
    model, tokenizer = models()
    questions = TASKS["tiny_math"].load(limit=2)
    prompts = [torch.tensor([Prompter(tokenizer).encode(question, [])]) for question in questions]
    decoder = SpeculativeDecoder(model, load_drafters(folders(), model), "confidence", shape=TreeShape())
    for line in read(finished):
        if (line["variant"], line["task"]) != ("confidence", "tiny_math"):
            continue
        index = [question.id for question in questions].index(line["question_id"])
        sampling = SamplingParams(line["temperature"], seed=row_seed(5, index))
        out = decoder.generate(prompts[index], sampling=sampling, max_new_tokens=6)
        (turn,), (choice,) = line["turns"], line["choices"]
        assert turn["tokens"] == out.new_tokens[0] and turn["finish_reason"] == out.finish_reasons[0]
        assert turn["num_accepted"] == out.stats.num_accepted[0] and turn["chosen"] == out.stats.choices[0]
        assert turn["prompt_length"] == prompts[index].shape[1] and turn["equals_plain"]
        assert line["seed"] == row_seed(5, index) and line["rows"] == 2
        assert choice["accept_lengths"] == [count + 1 for count in turn["num_accepted"]]
        assert choice["new_tokens"] == [len(turn["tokens"])] and choice["decoding_steps"] == [len(turn["num_accepted"])]
        assert choice["turns"] == [tokenizer.decode(turn["tokens"], skip_special_tokens=True).strip()]
        assert line["model_id"] == "tiny/confidence" and line["drafters"] == ["math", "chat"]


def test_seeds_count_through_a_tasks_batches_and_clocks_have_run(finished: Path) -> None:
    places = {question.id: place for place, question in enumerate(TWO_TURNS)}
    lines = read(finished)
    assert {line["question_id"]: line["seed"] for line in lines if line["task"] == "prompts"} == {
        name: row_seed(5, place) for name, place in places.items()
    }
    assert all(seconds > 0 for line in lines for seconds in line["choices"][0]["wall_time"])


def test_plain_lines_have_a_step_a_token_but_the_first(finished: Path) -> None:
    lines = [line for line in read(finished) if line["variant"] == "plain"]
    assert lines
    for line in lines:
        assert line["signals"] == {} and line["drafters"] == []
        for turn in line["turns"]:
            count = len(turn["tokens"]) - 1
            assert turn["num_accepted"] == turn["num_proposed"] == [0] * count and turn["num_nodes"] == [1] * count
            assert turn["chosen"] == [None] * count and turn["proposers"] == [[]] * count and turn["equals_plain"]


def test_there_is_one_line_a_variant_task_temperature_and_question_and_the_texts_are_plains(finished: Path) -> None:
    keys = Counter(results.key_of(line) for line in read(finished))
    assert set(keys.values()) == {1} and len(keys) == 5 * 2 * 5
    assert len({line["answer_id"] for line in read(finished)}) == len(keys)
    summary = summarise(finished)
    assert summary.num_texts == 4 * 2 * 5 and summary.num_different == 0
    assert summary.verdict() == "All 40 answers equal plain decoding's, token by token."


def test_budgets_hold_in_the_lines(finished: Path) -> None:
    nodes: dict[str, set[int]] = {}
    for line in read(finished):
        nodes.setdefault(line["variant"], set()).update(count for turn in line["turns"] for count in turn["num_nodes"])
    assert max(nodes["merged@8"]) == 8 and max(nodes["confidence"]) == max(nodes["average"]) == 60
    assert 60 < max(nodes["merged"]) <= 119


def test_a_second_turn_is_asked_after_the_variants_own_answer(finished: Path) -> None:
    _, tokenizer = models()
    for line in read(finished):
        if line["question_id"] == "b":
            first, second = line["turns"]
            asked, answer = TWO_TURNS[1].turns, line["choices"][0]["turns"][0]
            messages = [{"role": "user", "content": asked[0]}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": asked[1]})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert second["prompt_length"] == len(tokenizer(text, add_special_tokens=False)["input_ids"])
            assert second["prompt_length"] > first["prompt_length"] and len(line["choices"][0]["wall_time"]) == 2
            counts = [
                sum(outcome["count"] for outcome in told["confidence"].values()) for told in line["signals"].values()
            ]
            assert sum(counts) == sum(sum(turn["num_proposed"]) for turn in line["turns"])


def test_answers_are_scored_as_the_task_says_and_prompts_are_not(tmp_path: Path, finished: Path) -> None:
    plain = next(line for line in read(finished) if line["task"] == "tiny_math" and line["variant"] == "plain")
    said = plain["choices"][0]["turns"][0]
    question = TASKS["tiny_math"].load(limit=2)[0]
    assert question.id == plain["question_id"]
    asked = [replace(question, references=(said,)), replace(question, id="n", references=("9999999",))]
    asked.append(replace(question, id="o", references=None))
    run(tmp_path, {"gsm8k": asked}, ["plain", "merged"], temperatures=(0.0,))
    right = [(line["variant"], line["turns"][0]["is_right"]) for line in read(tmp_path)]
    assert Counter(right) == Counter((name, value) for name in ("plain", "merged") for value in (True, False, None))
    assert all(
        turn["is_right"] is None for line in read(finished) if line["task"] == "prompts" for turn in line["turns"]
    )


def test_the_system_prompt_stands_before_conversations_that_bring_none() -> None:
    _, tokenizer = models()
    seen: list[Any] = []

    class Tokenizer:
        chat_template = "there is one"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            seen.append(messages)
            return ""

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

    own = (
        {"role": "system", "content": "own"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "v"},
    )
    prompter = Prompter(Tokenizer(), "be brief")
    prompter.encode(Question("q", "c", ("ask",)), [])
    prompter.encode(Question("q", "c", ("ask",), history=own), [])
    prompter.encode(Question("q", "c", ("ask", "more"), history=own[1:]), ["said"])
    assert [[message["content"] for message in messages] for messages in seen] == [
        ["be brief", "ask"],
        ["own", "u", "v", "ask"],
        ["be brief", "u", "v", "ask", "said", "more"],
    ]


def test_batches_are_in_order_and_of_equally_many_turns() -> None:
    questions = [Question(str(i), "c", ("x",) * turns) for i, turns in enumerate((1, 1, 1, 2, 2, 1))]
    plan = Plan({"t": questions}, [Variant("plain", "plain")], [0.0, 1.0], SHORT, {}, {})
    made = batches(plan)
    assert [(one.temperature, one.first, len(one.questions)) for one in made[:4]] == [
        *((0.0, 0, 2), (0.0, 2, 1), (0.0, 3, 2), (0.0, 5, 1))
    ]
    assert len(made) == 8 and [one.first for one in made[4:]] == [0, 2, 3, 5] and made[7].temperature == 1


def test_on_each_batch_plain_is_followed_by_every_variant(finished: Path) -> None:
    order = list(dict.fromkeys((line["task"], line["temperature"], line["variant"]) for line in read(finished)[:10]))
    assert order == [("tiny_math", 0.0, name) for name in ("plain", *SPECS)]


# ---- the folder


def cut(folder: Path, num_lines: int, torn: bytes = b"") -> None:
    """As a process left it that was killed after so many lines."""
    path = folder / "answers-0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:num_lines]) + torn)


@pytest.mark.parametrize(
    ("num_lines", "torn"),
    [(1, b'{"question_id": "tiny'), (43, b"\0\0\0"), (47, b'{"a"}\n'), (49, b"")],
)
def test_a_run_that_was_killed_anywhere_ends_with_the_same_lines(
    folder: Path, finished: Path, num_lines: int, torn: bytes
) -> None:
    cut(folder, num_lines, torn)
    again(folder)
    assert list(map(timeless, read(folder))) == list(map(timeless, read(finished)))
    assert (folder / "run.json").read_bytes() == (finished / "run.json").read_bytes()


def test_what_is_there_is_not_done_again_whichever_process_did_it(folder: Path) -> None:
    lines = (folder / "answers-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "answers-0.jsonl").write_bytes(b"".join(lines[30:]))
    (folder / "answers-3.jsonl").write_bytes(b"".join(lines[:30]) + b"torn")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **before,
        "answers-3.jsonl": b"".join(lines[:30]),
    }


def test_texts_that_differ_from_plains_are_told_loudly(folder: Path) -> None:
    path = folder / "answers-0.jsonl"
    lines = list(map(json.loads, path.read_text().splitlines()))
    kept = [
        line for line in lines if (line["variant"], line["question_id"]) not in (("merged", "b"), ("merged@8", "b"))
    ]
    for line in kept:
        if (line["variant"], line["question_id"], line["temperature"]) == ("plain", "b", 1.0):
            line["turns"][1]["tokens"][2] += 1
        if (line["variant"], line["question_id"], line["temperature"]) == ("plain", "b", 0.0):
            line["turns"][0]["tokens"].append(9)  # of which the others' text is a part
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    again(folder)
    new = [line for line in read(folder) if (line["variant"], line["question_id"]) == ("merged", "b")]
    assert [[turn["equals_plain"] for turn in line["turns"]] for line in new] == [[False, True], [True, False]]
    summary = summarise(folder)
    assert summary.num_different == 4 and "4 OF 40 ANSWERS DIFFER" in summary.verdict() and "BUG" in summary.verdict()
    rounded = replace(summary, dtype="bfloat16")
    assert summary.is_broken and not rounded.is_broken and "rounds" in rounded.verdict()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label": "other"}, "label is mine there and other here"),
        ({"settings": replace(SHORT, max_new_tokens=8)}, "settings.max_new_tokens is 6 there and 8 here"),
        ({"settings": replace(SHORT, seed=0)}, "settings.seed is 5 there and 0 here"),
        ({"temperatures": (1.0,)}, r"temperatures is \[0.0, 1.0\] there and \[1.0\] here"),
        ({"specs": SPECS[:-1]}, "variants.average is there and not here"),
        (
            {"specs": ("confidence@9", *SPECS[1:])},
            "variants.confidence is there .*confidence@9 is here",
        ),
        ({"tasks": {"prompts": TWO_TURNS}}, "tasks.tiny_math is there and not here"),
        ({"drafters": {"math": folders()["math"], "chat": folders()["math"]}}, "drafters.chat.sha256"),
        ({"target_name": "else"}, "target.name is tiny there and else here"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_and_left_alone(
    folder: Path, changes: dict[str, Any], sentence: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=sentence):
        again(folder, **changes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_answers_drawn_when_a_seed_meant_other_noise_are_not_added_to(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    del run["noise"]
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="noise is here and not there"):
        again(folder)


def test_a_question_that_reads_otherwise_is_another_configuration(folder: Path) -> None:
    for other in (
        replace(TWO_TURNS[0], turns=("Liam has 5 eggs.",)),
        replace(TWO_TURNS[0], references=("8",)),
        replace(TWO_TURNS[0], history=({"role": "system", "content": "x"},)),
        replace(TWO_TURNS[0], id="z"),
    ):
        tasks = {"tiny_math": TASKS["tiny_math"].load(limit=2), "prompts": (other, *TWO_TURNS[1:])}
        with pytest.raises(ValueError, match=r"tasks\.prompts\.sha256"):
            again(folder, tasks=tasks)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("run.json", "{", "run.json cannot be read"),
        ("run.json", "[]", "not of an evaluation"),
        ("answers-0.jsonl", "no JSON\n{}\n", "answers-0.jsonl, line 1: no answer"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(folder: Path, file: str, content: str, sentence: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        again(folder)
    assert (folder / file).read_text().startswith(content[:7])


def test_answers_without_the_run_they_are_of_are_refused(folder: Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json says of what"):
        again(folder)


def test_a_folder_that_another_run_took_meanwhile_is_left_to_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock = tmp_path / "results", results._lock

    def lock_late(path: Path) -> int:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        return lock(path)

    monkeypatch.setattr(results, "_lock", lock_late)
    with pytest.raises(ValueError, match="another configuration"):
        again(folder, label="other")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in finished.iterdir()
    }


def test_two_evaluations_do_not_write_to_one_folder(folder: Path) -> None:
    lock = results._lock(folder)
    try:
        with pytest.raises(ValueError, match="another evaluation writes"):
            again(folder)
    finally:
        os.close(lock)
    again(folder)


def test_a_run_that_goes_on_with_other_code_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taps_ext.native.code_version", lambda: {"taps_ext": "9", "commit": "abc"})
    again(folder)
    again(folder)
    provenance = json.loads((folder / "run.json").read_text())["provenance"]
    assert provenance.get("commit") != "abc" and [later["commit"] for later in provenance["resumed"]] == ["abc"]


# ---- what cannot be evaluated


@pytest.fixture
def stranger(tmp_path: Path) -> Callable[..., Path]:
    """A drafter's folder whose config says something else."""

    def make(**changes: Any) -> Path:
        folder = Path(shutil.copytree(folders()["math"], tmp_path / "stranger"))
        config = json.loads((folder / "config.json").read_text())
        config["taps"] |= changes.pop("taps", {})
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


def refused(tmp_path: Path, sentence: str, tasks: Mapping[str, Sequence[Question]] | None = None, **given: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path / "results", tasks or {"prompts": TWO_TURNS}, **given)
    assert not (tmp_path / "results").exists()


def test_a_drafter_of_another_target_is_refused(tmp_path: Path, stranger: Any) -> None:
    other = stranger(taps={"target": {"name": "Llama", "fingerprint": "12ab"}})
    refused(tmp_path, "drafter 'chat' is of another target, Llama", drafters={"math": folders()["math"], "chat": other})


def test_a_drafter_of_another_vocabulary_is_refused(tmp_path: Path, stranger: Any) -> None:
    other = stranger(vocab_size=1000)
    refused(tmp_path, "drafter 'chat': .*vocabulary", drafters={"math": folders()["math"], "chat": other})


def test_a_question_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    long = Question("long", "c", ("word " * 3000, "and?"))
    refused(tmp_path, "question long may come to .* context is 2048", {"prompts": [long]})
    fits = Question("fits", "c", ("word " * 800,))
    length = len(Prompter(models()[1]).encode(fits, []))
    assert length < 2048
    answers = replace(SHORT, max_new_tokens=2049 - length)
    refused(tmp_path, "question fits may come to 2049 tokens with its answers", {"prompts": [fits]}, settings=answers)


def test_a_chat_template_that_refuses_a_system_prompt_says_so_in_a_sentence(tmp_path: Path) -> None:
    tokenizer = copy.copy(models()[1])
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    settings = replace(SHORT, system_prompt="Be brief.")
    refused(tmp_path, "refuses question a: no system role", models=(models()[0], tokenizer), settings=settings)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = copy.copy(models()[1])
    tokenizer.chat_template = None
    refused(tmp_path, "no chat template", models=(models()[0], tokenizer))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"temperatures": (0.0, 0.0)}, "a temperature is given twice"),
        ({"temperatures": (-1.0,)}, "temperature must be"),
        ({"tasks": {"prompts": ()}}, "a task with questions"),
        ({"tasks": {"prompts": [TWO_TURNS[0], TWO_TURNS[0]]}}, "has the question id 'a' twice"),
        ({"settings": replace(SHORT, seed=2**63)}, "seed"),
        ({"settings": replace(SHORT, seed=10**20)}, "seed"),
    ],
)
def test_a_plan_of_nothing_is_refused(tmp_path: Path, given: dict[str, Any], sentence: str) -> None:
    refused(tmp_path, sentence, **given)


def test_settings_that_cannot_be_are_refused() -> None:
    for name in ("max_new_tokens", "batch_size", "depth", "branching", "max_nodes"):
        with pytest.raises(ValueError, match=name):
            Settings(**{name: 0})
    with pytest.raises(ValueError, match="max_new_tokens must be at least 2"):
        Settings(max_new_tokens=1)
