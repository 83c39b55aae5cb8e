"""A process that renders chat templates, which come with checkpoints and are not to be trusted.

`python -m ping_llm.extraction.template_process` reads JSON lines and answers each with one: first
{name: template}, then requests {"name", "variables"}. It may use a gigabyte of memory; whoever
started it gives it as long as he likes. What templates see is what transformers 5 shows them.
"""

import datetime
import json
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 1 << 30
LONGEST = 1 << 26  # characters of an answer


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says and changes nothing of it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace takes no {name!r}")
        super().__setitem__(name, value)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Returns what templates are compiled in."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    own = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= own | {"namespace": _Namespace}
    return environment


def answer(templates: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, str]:
    """Returns the text that a template makes of variables, or the error that it raises."""
    try:
        text = templates[request["name"]].render(**request["variables"])
    except MemoryError:
        return {"error": "it takes more than 1 GB of memory"}
    except Exception as error:  # a template may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    if len(text) > LONGEST:
        return {"error": f"it makes {len(text)} characters, more than {LONGEST}"}
    return {"text": text}


def main() -> None:
    """Answers until nothing more is asked."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):  # not on this system
        pass
    environment, templates = make_environment(), {}
    sources = json.loads(sys.stdin.readline())
    result: dict[str, str] = {}
    try:
        templates = {name: environment.from_string(source) for name, source in sources.items()}
    except Exception as error:  # also of the compiler, where it is nested too deep
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    while True:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        if not (line := sys.stdin.readline()):
            return
        result = answer(templates, json.loads(line))


if __name__ == "__main__":
    main()
