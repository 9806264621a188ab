"""YAML as recipes use it: of the plain words only null, true, false and numbers mean something, and 3e-5 is a number.

(YAML 1.1, which PyYAML reads, takes 3e-5 for text, no for false, 010 for eight and 1:30 for ninety.)
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, ClassVar

_PLAIN_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


def read_yaml(text: str, origin: str) -> Any:
    """What the text says; ValueError that names the line, after `origin`, if it is no YAML or gives a key twice."""
    yaml, loader, _ = _dialect()
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{origin}{line} is not YAML: {problem}") from error


def write_yaml(tree: Any) -> str:
    """YAML that `read_yaml` reads as the same; text that looks like something else is quoted."""
    yaml, _, dumper = _dialect()
    text: str = yaml.dump(tree, Dumper=dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return text


@cache
def _dialect() -> tuple[Any, Any, Any]:
    """The module, our loader and our dumper."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ValueError("recipes need yaml: pip install 'taps_ext[train]'") from error

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key} is given twice", problem_mark=node.value[index][0].start_mark
                    )
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):  # has the words of YAML 1.1 too: what it quotes, every reader takes for text
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
            first: list(words) for first, words in yaml.SafeDumper.yaml_implicit_resolvers.items()
        }

    for tag, words, firsts in _PLAIN_WORDS:
        for dialect in (Loader, Dumper):
            dialect.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{words})$"), firsts)
    return yaml, Loader, Dumper
