"""The tiny world: a generated corpus of four domains; for two of them a target and specialist drafters, as assets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .corpus import ALL_DOMAINS, DOMAINS, Conversation, conversations, prompts, switching_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ALL_DOMAINS", "DOMAINS", "TINY", "Conversation", "assets", "conversations", "drafter_paths", "load_target"]
__all__ += ["prompts", "resolve", "switching_prompts"]

TINY = "tiny"  # the embedded target; and before a slash, its drafters: tiny/math


def assets() -> Path:
    """The folder with target/, drafters/ and recipe.json; FileNotFoundError if this installation has none."""
    folder = Path(__file__).parent / "assets"
    if not (folder / "target" / "config.json").exists():
        raise FileNotFoundError(
            f"no tiny models in {folder}; make them: python -m taps_ext.tiny.recipe --output {folder}"
        )
    return folder


def load_target() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tiny target in float32, in evaluation mode, and its tokenizer (with a chat template)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets() / "target"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def drafter_paths() -> dict[str, Path]:
    """The folder of each specialist drafter, by domain."""
    return {domain: assets() / "drafters" / domain for domain in DOMAINS}


def resolve(path_or_id: str) -> str:
    """The folder of an embedded model by its name (tiny, tiny/math, tiny/chat); any other name as it is.

    Raises ValueError, in a sentence, for an embedded drafter that there is not.
    """
    if path_or_id == TINY:
        return str(assets() / "target")
    if not path_or_id.startswith(f"{TINY}/"):
        return path_or_id
    domain, drafters = path_or_id.removeprefix(f"{TINY}/"), drafter_paths()
    if domain not in drafters:
        raise ValueError(f"there is no embedded drafter {path_or_id}; there are {', '.join(drafters)}")
    return str(drafters[domain])
