"""`make wheel`: what its metadata promises, what is in it, and that it works where nothing but its requirements is."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MINOR = ".".join(torch.__version__.split(".")[:2])
VARIABLES = ("TAPS_NO_EXT", "TAPS_DEBUG", "TAPS_SIMT", "TAPS_SANITIZE", "FORCE_CUDA", "TAPS_FORCE_CUDA")

USE_IT = """
import torch, taps_ext
from taps_ext import ops
print(taps_ext.__file__)
print(ops.tree_depths(torch.tensor([[-1, 0, 1]]), torch.tensor([3])).tolist())
"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU wheel for the torch that is here."""
    folder = tmp_path_factory.mktemp("dist")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, env={**environment, "TAPS_PIN_TORCH": "1", "TAPS_NO_CUDA": "1"})
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin of a new environment with the wheel, which finds torch and the rest where they are installed now."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_the_version_names_torch_and_cuda_in_the_file_name_and_in_the_metadata(wheel: Path, metadata: Message) -> None:
    label = f"+cputorch{MINOR}"
    assert metadata["Version"].endswith(label)
    assert wheel.name.startswith(f"taps_ext-{metadata['Version']}-cp")


def test_the_wheel_requires_the_minor_version_of_torch_that_it_was_built_for(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist") or []
    assert [text for text in requirements if re.match(r"torch\b", text)] == [f"torch=={MINOR}.*"]
    assert any(text.startswith("transformers>=") for text in requirements)


def test_the_wheel_holds_the_package_with_one_native_module_and_no_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"taps_ext", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert [name for name in names if name.endswith(".so")] == [f"taps_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert {"taps_ext/py.typed", "taps_ext/assets/target/model.safetensors"} <= set(names)
    assert {"taps_ext/assets/drafters/math/calibration.json", "taps_ext/assets/prompts.jsonl"} <= set(names)
    assert not [name for name in names if "worlds" in name], "what generates the embedded models stays out"


def test_the_installed_wheel_runs_an_op(environment: Path, tmp_path: Path) -> None:
    done = subprocess.run([environment / "python", "-c", USE_IT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, depths = done.stdout.split("\n", 1)
    assert path.startswith(str(environment.parent))
    assert json.loads(depths) == [[0, 1, 2]]


def test_info_tells_the_truth_about_the_wheel(environment: Path, metadata: Message, tmp_path: Path) -> None:
    done = subprocess.run([environment / "taps-ext", "info", "--json"], cwd=tmp_path, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert facts["taps_ext"] == metadata["Version"]
    assert facts["native"]["build"]["torch"] == torch.__version__
    cuda = facts["cuda"]
    assert (cuda["ops_built"], cuda["version"], cuda["architectures"]) == (False, None, [])
    assert cuda["reason"] == "TAPS_NO_CUDA=1"
    assert len(cuda["gpus"]) == torch.cuda.device_count()


def test_the_source_distribution_holds_all_that_is_compiled_and_no_stand_in(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TAPS_NO_EXT": "1"}, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames() if "." in name.rsplit("/", 1)[-1]}
    compiled = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert compiled | {"setup.py", "tools/cuda_toolkit.py"} <= names
    assert not any("simt" in name for name in names)
