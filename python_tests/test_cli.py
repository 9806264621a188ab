"""The command line, run for real on small models that the tests save to folders."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import small_models
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from training_cases import write_conversations
from transformers import PreTrainedTokenizerFast
from typer.models import OptionInfo
from typer.testing import CliRunner

import taps_ext as taps
from taps_ext import tiny
from taps_ext.checkpoints import save_drafter
from taps_ext.checkpoints.corpus import write_store
from taps_ext.checkpoints.files import write_text
from taps_ext.cli import app, main, terminal

PROMPT = "t2 t10 t11 t12"
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A target with its tokenizer and two drafters, as a user has them on disk."""
    root = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(small_models.VOCAB)}, unk_token="t4"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "target")
    target = small_models.trained_target()
    target.save_pretrained(root / "target")
    for name, drafter in small_models.trained_drafters().items():
        save_drafter(drafter.network, root / name, embedding=target.get_input_embeddings(), target_config=target.config)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def generate(run, model_folders):
    """`taps-ext generate` on the small models."""

    def generate(*arguments: str, prompt: tuple[str, ...] = ("--prompt", PROMPT)) -> tuple[int, str, str]:
        drafters = [f"--drafter={name}={model_folders[name]}" for name in ("math", "chat")]
        return run("generate", "--target", model_folders["target"], *drafters, *prompt, *arguments)

    return generate


def in_new_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_import_needs_the_four_libraries_only_and_no_native_module() -> None:
    absent = ["typer", "rich", "matplotlib", "pandas", "scipy", "jinja2", "accelerate", "datasets", "hypothesis"]
    absent.append("taps_ext._C")
    use_all = "import taps_ext; [getattr(taps_ext, name) for name in taps_ext.__all__]"
    done = in_new_python(f"import sys; sys.modules.update(dict.fromkeys({absent})); {use_all}")
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_one_in_the_metadata() -> None:
    assert taps.__version__ == importlib.metadata.version("taps_ext")


def test_without_typer_the_command_line_names_the_extra() -> None:
    done = in_new_python("import sys; sys.modules['typer'] = None; import taps_ext.cli")
    assert done.returncode == 2
    assert done.stderr == "taps-ext: the command line needs typer: pip install 'taps_ext[cli]'\n"


def test_info_says_what_was_built_and_why(run) -> None:
    code, out, err = run("info", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["native"]["available"]
    assert facts["native"]["reason"] is None
    assert facts["native"]["build"]["torch"] == torch.__version__
    assert facts["cuda"]["reason"] == facts["native"]["build"]["cuda_reason"]
    assert facts["num_threads"] == torch.get_num_threads()


def test_info_for_people_holds_the_same_facts(run) -> None:
    code, out, _ = run("info")
    assert code == 0
    assert torch.__version__ in out
    assert "CUDA ops" in out


def test_info_says_why_the_native_module_is_missing() -> None:
    code = "import sys; sys.modules['taps_ext._C'] = None; from taps_ext.cli import main; main(['info', '--json'])"
    done = in_new_python(code)
    native = json.loads(done.stdout)["native"]
    assert done.returncode == 0
    assert not native["available"]
    assert "make build" in native["reason"]


@pytest.mark.parametrize("composition", ["single", "confidence", "entropy", "merged"])
def test_generate_prints_the_text_of_plain_decoding_as_json(generate, composition: str) -> None:
    single = ["--single-drafter", "math"] if composition == "single" else []
    shape = "--depth", "3"  # else the step's costs decide whether anything is drafted
    code, out, err = generate("--composition", composition, *single, *shape, "--max-new-tokens", "20", "--json")
    result = json.loads(out)
    prompt = torch.tensor([[2, 10, 11, 12]])
    plain = taps.plain_generate(small_models.trained_target(), prompt, max_new_tokens=20)
    assert code == 0, err
    assert result["new_tokens"] == plain.new_tokens[0]
    assert result["text"] == " ".join(f"t{token}" for token in plain.new_tokens[0])
    assert result["finish_reason"] == plain.finish_reasons[0]
    assert result["stats"]["num_target_forwards"] == result["stats"]["num_steps"] + 1
    assert result["stats"]["acceptance_length"] > 1


def test_generate_names_the_extension_among_the_proposers_and_keeps_the_text(generate) -> None:
    plain, extended = (json.loads(generate(*extra, "--json")[1]) for extra in ((), ("--extend",)))
    assert extended["new_tokens"] == plain["new_tokens"]
    assert extended["stats"]["drafters"] == [*plain["stats"]["drafters"], "extension"]
    assert "extension " in generate("--extend")[1], "in the figures"


def test_generate_samples_by_seed(generate) -> None:
    def text(seed: str) -> str:
        return json.loads(generate("--temperature", "1", "--top-k", "20", "--seed", seed, "--json")[1])["text"]

    texts = [text(seed) for seed in "334"]
    assert texts[0] == texts[1] != texts[2]


def test_a_warning_is_one_line_once_and_python_keeps_its_own_form(generate, model_folders, recwarn) -> None:
    _, _, err = generate("--temperature", "1", "--max-new-tokens", "4")
    assert re.search("^warning: not calibrated, .*math, chat; .* run: taps-ext calibrate", err, re.M)
    assert err.count("not calibrated") == 1 and "UserWarning" not in err and ".py" not in err
    target = small_models.trained_target()
    drafters = taps.load_drafters({name: model_folders[name] for name in ("math", "chat")}, target)
    assert not recwarn
    decoder = taps.SpeculativeDecoder(target, drafters)
    decoder.generate(torch.tensor([[2, 10]]), sampling=taps.SamplingParams(1.0), max_new_tokens=2)
    assert {Path(one.filename).name for one in recwarn} == {Path(__file__).name}


def test_generate_streams_the_same_text_and_then_the_figures(generate) -> None:
    result = json.loads(generate("--max-new-tokens", "24", "--json")[1])
    code, out, _ = generate("--max-new-tokens", "24")
    text, _, figures = out.partition("\n\n")
    assert code == 0
    assert text == result["text"]
    assert f"{result['stats']['acceptance_length']:.2f} tokens a step" in figures
    assert f"{result['stats']['num_target_forwards']} for {len(result['new_tokens'])} tokens" in figures


def test_the_prompt_may_come_from_a_file_or_from_standard_input(generate, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    texts = [json.loads(generate("--json")[1])["text"]]
    texts += [json.loads(generate("--json", prompt=("--prompt-file", str(tmp_path / "prompt.txt")))[1])["text"]]
    with (tmp_path / "prompt.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        texts += [json.loads(generate("--json", prompt=())[1])["text"]]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--composition", "average"], "composition must be one of single, confidence, entropy, evidence, merged"),
        (["--composition", "single"], "--single-drafter, one of math, chat"),
        (["--drafter", "other=tiny/other"], "there is no embedded drafter tiny/other; there are tiny/math, tiny/chat"),
        (["--drafter", "math="], "NAME=DIRECTORY-OR-HUB-ID, got 'math='"),
        (["--drafter", "math=twice"], "'math' is given twice"),
        (["--prompt-file", "p"], "not both"),
        (["--dtype", "int8"], "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        (["--device", "gpu"], "device must be cpu, cuda or cuda:NUMBER, got 'gpu'"),
        (["--device", "cuda:x"], "device must be cpu, cuda or cuda:NUMBER, got 'cuda:x'"),
        (["--device", "cpu:0"], "device must be cpu, cuda or cuda:NUMBER, got 'cpu:0'"),
        (["--device", "cuda:99"], "device cuda:99 was asked for, but torch"),
        (["--temperature", "-1"], "temperature must be finite and at least 0, got -1.0"),
        (["--top-p", "1.5"], "top_p must be between 0 and 1"),
        (["--branching", "0"], "TreeShape.branching must be an integer of at least 1, got 0"),
        (["--target", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--prompt", "   "], "the prompt is empty"),
        (["--seed", "99999999999999999999"], "seed must be a 64-bit integer, got 99999999999999999999"),
        (["--merged-nodes", "0"], "max_nodes of the merged tree must be at least 1, got 0"),
    ],
)
def test_an_expected_error_is_one_sentence_and_exit_code_2(generate, arguments: list[str], said: str) -> None:
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("taps-ext: ")
    assert err.count("\n") == 1


def test_look_ups_need_no_files_with_any_target(run, model_folders) -> None:
    arguments = ["--target", model_folders["target"], "--prompt", PROMPT, "--max-new-tokens", "30", "--json"]
    code, out, err = run("generate", "--drafter", "mine=lookup", *arguments)
    assert code == 0, err
    plain = taps.plain_generate(small_models.trained_target(), torch.tensor([[2, 10, 11, 12]]), max_new_tokens=30)
    assert json.loads(out)["new_tokens"] == plain.new_tokens[0]
    assert json.loads(out)["stats"]["drafters"] == ["mine"]


def test_a_stores_directory_is_a_drafter_and_continues_extended_roots(tmp_path, run):
    texts, folder = tmp_path / "texts.jsonl", str(tmp_path / "s")
    texts.write_text('{"text": "The sum of two and three is five."}\n')
    arguments = ("--target", "tiny", "--prompt", "The sum of", "--raw", "--max-new-tokens", "8", "--json")
    code, out, _ = run("index", str(texts), "-o", folder)
    assert code == 0
    plain = run("generate", "--drafter", "tiny/math", *arguments)
    drafted = run("generate", "--drafter", f"code={folder}", *arguments)
    extended = run("generate", "--drafter", "tiny/math", "--extend", "--store", folder, *arguments)
    lines = [out for code, out, _ in (plain, drafted, extended) if code == 0]
    assert len({line.split('"new_tokens"')[1].split("]")[0] for line in lines}) == 1 and len(lines) == 3
    code, out, err = run("generate", "--drafter", "lookup", "--store", folder, *arguments)
    assert (code, out) == (
        2,
        "",
    ) and f"--store goes with --extend; to draft from the store, give --drafter NAME={folder}" in err
    target, _ = tiny.load_target()
    write_store(folder, [[1, 2]], target.config.vocab_size, "of another tokenizer")
    for options in (("--drafter", f"code={folder}"), ("--extend", "--store", folder)):
        code, out, err = run("generate", *options, *arguments)
        assert (code, out) == (2, "") and "was made with another tokenizer" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "pattern, change, said",
    [
        ("*.safetensors", lambda file: os.truncate(file, 2000), "the target {folder} cannot be loaded ("),
        ("tokenizer*.json", lambda file: file.unlink(), "the tokenizer of the target {folder} cannot be loaded ("),
    ],
)
def test_a_target_that_is_torn_or_has_no_tokenizer_is_one_sentence(
    run, tmp_path: Path, pattern: str, change: Callable[[Path], Any], said: str
) -> None:
    folder = shutil.copytree(tiny.resolve("tiny"), tmp_path / "target")
    for file in folder.glob(pattern):
        change(file)
    code, out, err = run("generate", f"--target={folder}", "--drafter=tiny/math", "--prompt", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"taps-ext: {said.format(folder=folder)}")


def test_a_drafter_given_as_the_target_is_refused_by_name(run) -> None:
    drafter = tiny.resolve("tiny/math")
    code, _, err = run("generate", f"--target={drafter}", "--drafter=lookup", "--prompt", "x")
    assert (code, err.count("\n")) == (2, 1) and f"{drafter} is a drafter, not a target; give it as the drafter" in err


def test_a_target_whose_files_lack_weights_is_refused(run, tmp_path: Path) -> None:
    """transformers would draw them at random."""
    folder = shutil.copytree(tiny.resolve("tiny"), tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    code, _, err = run("generate", f"--target={folder}", "--drafter=lookup", "--prompt", "x")
    assert code == 2 and f"taps-ext: the target {folder} lacks weights that its config asks for, such as model.l" in err


def test_a_chat_template_that_fails_is_one_sentence_and_raw_prompts_need_none(run, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.resolve("tiny"), tmp_path / "target")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    arguments = ("generate", f"--target={folder}", "--drafter=lookup", "--prompt=x", "--max-new-tokens=2")
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1) and "the tokenizer's chat template refuses the prompt: can only" in err
    assert run(*arguments, "--raw")[0] == 0


@pytest.mark.parametrize(
    "arguments", ["generate --prompt t2", "check-lossless --limit 2 --max-new-tokens 2 --draws 0 --composition merged"]
)
def test_prompts_that_no_chat_template_is_applied_to_are_noted_once(run, model_folders, arguments: str) -> None:
    sentence = "the tokenizer has no chat template, so that prompts are decoded as they are\n"
    arguments = f"{arguments} --target {model_folders['target']} --drafter lookup"
    assert run(*arguments.split())[2].count(sentence) == 1
    if arguments.startswith("generate"):
        assert sentence not in run(*arguments.split(), "--raw")[2]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), None])
def test_too_little_memory_is_one_sentence(run, monkeypatch, error: Exception | None) -> None:
    def work(*_: Any, **__: Any) -> None:
        if error is not None:
            raise error
        torch.empty(2**50)

    monkeypatch.setattr("taps_ext.native.installation", work)
    code, _, err = run("info")
    assert (code, err.count("\n")) == (2, 1) and err.startswith("taps-ext: out of memory (")


def test_a_runtime_error_of_another_kind_is_not_hidden(monkeypatch) -> None:
    def work() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("taps_ext.native.installation", work)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_costs_are_never_written_over_a_directory(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    monkeypatch.setattr(terminal, "load_target_and_tokenizer", lambda *_: pytest.fail("the work was done"))
    code, _, err = run("tune", "-o", str(tmp_path / "mine"))
    assert code == 2 and "mine is a directory; give the name of a file" in err
    assert run("tune", "-o", str(tmp_path / "mine" / "file" / "costs.json"))[0] == 2
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "mine", "x")
    assert (tmp_path / "mine" / "file").read_text() == "x"


@pytest.mark.parametrize("directory", ["/proc/none", "/proc"])
def test_an_output_that_the_system_refuses_is_refused_before_the_work(run, monkeypatch, directory: str) -> None:
    monkeypatch.setattr("taps_ext.cli.demo.run", lambda *_: pytest.fail("the work was done"))
    code, _, err = run("demo", "-o", directory)
    assert code == 2 and re.fullmatch(f"taps-ext: {directory} cannot be written to, as .*; give another one\n", err)


def test_a_target_other_than_tiny_needs_a_drafter(run, model_folders) -> None:
    code, _, err = run("generate", "--target", model_folders["target"], "--prompt", PROMPT)
    assert code == 2
    assert "give at least one drafter" in err


def test_what_is_written_is_named_for_programs(run, tmp_path: Path) -> None:
    pair, half, both = ("average", "tiny/math", "tiny/chat"), tmp_path / "half", tmp_path / "both"
    assert json.loads(run(*pair, "-o", str(half), "--json")[1]) == {"drafters": [str(half)]}
    swept = json.loads(run(*pair, "--sweep=0:1:1", "-o", str(both), "--json")[1])
    assert swept == {"drafters": [str(both / "0"), str(both / "1")]}
    code, out, _ = run("export", "tiny/math", "--to=sglang", "-o", str(tmp_path / "sglang"), "--json")
    told = json.loads(out)
    assert code == 0 and told["drafter"] == str(tmp_path / "sglang")
    assert "max_position_embeddings is 2048" in told["notes"][0]
    code, out, err = run("export", "tiny/math", "--to=eagle", "--dtype=int8", "-o", str(tmp_path / "eagle"), "--json")
    assert (code, out) == (2, "") and "dtype must be auto, float32, bfloat16 or float16, got 'int8'" in err


@pytest.mark.parametrize(
    "arguments, work, is_resumed",
    [
        ("generate --prompt x", "taps_ext.decode.decoder.SpeculativeDecoder.stream", False),
        ("demo -o {out}", "taps_ext.cli.demo.run", False),
        ("report {out} -o {out}", "taps_ext.evaluation.counts.read", False),
        ("evaluate --limit 1 -o {out}", "taps_ext.evaluation.runner.evaluate", True),
        ("check-lossless --limit 1", "taps_ext.evaluation.lossless.check_lossless", False),
        ("train {recipe}", "taps_ext.training.run.train", True),
        ("features {recipe} features.path={out}", "taps_ext.cli.train.prepare", True),
        ("regenerate --target tiny --data {data} -o {out}", "taps_ext.training.regenerate.regenerate", True),
        ("calibrate {drafter} --target tiny --data {data}", "taps_ext.cli.drafters.calibrate_drafter", False),
        ("average tiny/math tiny/chat -o {out}", "taps_ext.checkpoints.average_drafters", False),
        ("export tiny/math --to vllm -o {out}", "taps_ext.checkpoints.export_drafter", False),
        ("validate tiny/math", "taps_ext.checkpoints.validate_drafter", False),
        ("info", "taps_ext.native.installation", False),
    ],
)
def test_ctrl_c_ends_every_command_with_one_line_and_its_own_exit_code(
    run, monkeypatch, tmp_path: Path, arguments: str, work: str, is_resumed: bool
) -> None:
    data, drafter, out = tmp_path / "data.jsonl", tmp_path / "drafter", tmp_path / "out"
    write_conversations(data, 8)
    shutil.copytree(tiny.resolve("tiny/math"), drafter)
    recipe = f"target=tiny output={out} data.sources=[{data}] training.steps=1"
    monkeypatch.setattr(work, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, printed, err = run(*arguments.format(data=data, drafter=drafter, out=out, recipe=recipe).split())
    assert (code, printed.strip()) == (130, "")
    assert err.splitlines()[-1] == ("stopped; the same command resumes it" if is_resumed else "stopped")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, stages",
    [
        ("evaluate --limit 1 --max-new-tokens 4 --task tiny_math --variant merged -o {out}", ["tiny_math, T = 0"]),
        ("regenerate --target tiny --data {data} --max-new-tokens 40 -o {out}", ["conversations"]),
        ("calibrate {drafter} --target tiny --data {data} --depth 1", ["conversations", "texts", "fits"]),
        ("features {recipe} features.path={out}", ["conversations", "tokens"]),
        ("check-lossless --limit 1 --max-new-tokens 4 --draws 0 --composition merged", ["merged"]),
    ],
)
def test_long_work_without_a_terminal_says_in_lines_how_far_it_is(
    run, monkeypatch, tmp_path: Path, arguments: str, stages: list[str]
) -> None:
    monkeypatch.setattr("taps_ext.cli.terminal.LINE_EVERY_S", 0.0)
    data, drafter, out = tmp_path / "data.jsonl", tmp_path / "drafter", tmp_path / "out"
    write_conversations(data, 40)
    shutil.copytree(tiny.resolve("tiny/math"), drafter)
    recipe = f"target=tiny output={out} data.sources=[{data}] training.steps=1"
    code, printed, err = run(*arguments.format(data=data, drafter=drafter, out=out, recipe=recipe).split())
    assert code == 0, err
    for stage in stages:
        assert re.search(rf"^{stage}.*: [1-9][\d,]* of [\d,]+", err, re.M), f"{stage}\n{err}"
    assert not re.search(r": \d+ of \d+, .* left", printed), "results are on stdout"


def test_the_bar_of_loading_weights_does_not_show(run, model_folders, monkeypatch) -> None:
    monkeypatch.setattr(terminal, "LOADING_AFTER_S", 0.0)
    transformers.utils.logging.enable_progress_bar()
    target = model_folders["target"]
    _, _, err = run("generate", f"--target={target}", f"--drafter={model_folders['math']}", "--prompt", PROMPT)
    assert "Loading weights" not in err and f"loading {target}\n" in err


def test_the_version_is_one_short_line(run) -> None:
    versions = (taps.__version__, torch.__version__, transformers.__version__)
    assert run("--version") == (0, "taps_ext {}, torch {}, transformers {}\n".format(*versions), "")


def test_the_installed_command_explains_itself() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("taps-ext"), "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    commands = ("demo", "generate", "info", "train", "features", "regenerate", "calibrate", "average", "export")
    assert all(command in done.stdout for command in (*commands, "validate"))


# ---- what the commands have in common


@dataclass(frozen=True)
class Option:
    """An option of a command, as its function declares it."""

    spellings: tuple[str, ...]
    type: Any
    is_repeatable: bool
    least: float | None
    help: str


def commands() -> dict[str, Callable[..., Any]]:
    return {one.callback.__name__.replace("_", "-"): one.callback for one in app.registered_commands if one.callback}


def options() -> dict[str, dict[str, Option]]:
    """Every spelling of an option, and the option by command."""
    spelled: dict[str, dict[str, Option]] = defaultdict(dict)
    for command, function in commands().items():
        for name, hint in get_type_hints(function, include_extras=True).items():
            kind, info, *_ = *get_args(hint), None, None
            if isinstance(info, OptionInfo):
                declared = [one for one in (info.default, *(info.param_decls or ())) if str(one).startswith("-")]
                names = tuple(declared or [f"--{name.replace('_', '-')}"])
                [kind] = {*(get_args(kind) if isinstance(kind, UnionType) else [kind])} - {NoneType}
                is_list, [value] = get_origin(kind) is list, get_args(kind) or [kind]
                option = Option(names, value, is_list, info.min, info.help or "")
                spelled |= {one: {**spelled[one], command: option} for one in names}
    return spelled


def test_an_option_is_spelled_and_means_the_same_in_every_command() -> None:
    for spelling, by_command in options().items():
        meanings = {
            replace(one, is_repeatable=False, help=one.help.removesuffix(" Repeatable.")) for one in by_command.values()
        }
        assert len(meanings) == 1, f"{spelling} of {', '.join(by_command)}: {meanings}"
    assert len(options()["--target"]) == 9 and len(options()["--temperature"]) == 6, "the reader sees them"


def test_output_has_a_short_form_and_every_command_prints_json() -> None:
    spelled = options()
    assert spelled["-o"].keys() == spelled["--output"].keys() >= {"demo", "regenerate", "average", "report"}
    assert spelled["--json"].keys() == commands().keys()


def test_every_option_is_explained_and_says_whether_it_may_be_repeated() -> None:
    for spelling, by_command in options().items():
        for name, option in by_command.items():
            assert re.match(r"[A-Z'\[\w].*[.]$", option.help, re.DOTALL), f"{name} {spelling}: {option.help}"
            assert option.is_repeatable == ("Repeatable" in option.help), f"{name} {spelling}: {option.help}"


@pytest.mark.parametrize("name", commands())
def test_every_command_says_what_it_does_and_is_in_the_documentation(name: str) -> None:
    first, *_ = inspect.getdoc(commands()[name]).split("\n\n")
    assert re.fullmatch(r"[A-Z][a-z]+ .*[.]", first, re.DOTALL), first
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert re.search(rf"(taps-ext|-m taps_ext) {name}\b|`{name} --", pages)


def test_without_a_temperature_the_generation_config_decides(tmp_path: Path) -> None:
    """The command writes what the decoder writes behind the same seed, and says where a text may end."""
    model, tokenizer = tiny.load_target()
    model.generation_config.update(do_sample=True, temperature=0.8, top_k=30, repetition_penalty=1.2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ["--target", str(tmp_path), "--drafter", "math=tiny/math", "--prompt", "What is 2 + 3?", "--json"]
    result = CliRunner().invoke(app, ["generate", *options, "--seed", "11", "--max-new-tokens", "24"])
    found = json.loads(result.stdout)
    decoder = taps.SpeculativeDecoder(model, taps.load_drafters({"math": tiny.resolve("tiny/math")}, model))
    torch.manual_seed(11)
    inputs = terminal.encode(tokenizer, [{"role": "user", "content": "What is 2 + 3?"}])
    assert found["new_tokens"] == decoder.generate(**inputs, max_new_tokens=24).new_tokens[0]
    assert found["end_tokens"] == {tokenizer.eos_token: tokenizer.eos_token_id}
    assert "temperature too" in str(CliRunner().invoke(app, ["generate", *options, "--top-k", "3"]).exception)


def test_a_text_that_leaves_the_targets_context_is_refused() -> None:
    result = CliRunner().invoke(app, ["generate", "--prompt", "x", "--max-new-tokens", "100000"])
    assert "and the target's context is" in str(result.exception) and "lower --max-new-tokens" in str(result.exception)
