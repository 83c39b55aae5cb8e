"""Chat templates, run in a process of their own.

A template is a program of strangers. Jinja's sandbox keeps it from reaching anything, but not from
`'a' * 10**9` or endless loops. So this file is also a script, which renders under limits on time
and memory; it imports nothing but the standard library and Jinja.
"""

import datetime
import json
import signal
import subprocess
import sys
import weakref
from typing import Any

CPU_SECONDS = 2.0  # of one prompt
MEMORY_BYTES = 1 << 29
LONGEST_TEXT = 1 << 21  # characters


class Renderer:
    """Some templates, in the process that renders them; it starts when first asked."""

    def __init__(self, sources: dict[str, str]):
        self._sources = sources
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self) -> None:
        """Checks that the templates can be used.

        Raises:
            ValueError: They cannot; the message says why.
        """
        self._ask({"sources": self._sources})

    def render(self, name: str, variables: dict[str, Any]) -> str:
        """Returns what a template makes of its variables.

        Values that are not JSON's are shown as their type, such as `<bytes>`.

        Raises:
            ValueError: It fails, or exceeds a limit; the message says why.
        """
        if self._process is None:
            self.compile()
        return self._ask({"name": name, "variables": variables})

    def _ask(self, request: dict[str, Any]) -> str:
        try:
            line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
        except RecursionError:
            raise ValueError("they are nested too deep") from None
        if self._process is None:
            # Not run as a module: that would put the working directory before the library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
            self._stop = weakref.finalize(self, _stop, self._process)
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            self._stop()
            code, self._process = self._process.returncode, None
            timed_out = code == -signal.SIGPROF
            raise ValueError(f"it takes over {CPU_SECONDS:g} s" if timed_out else "it crashed")
        text, error = json.loads(answer)
        if error is not None:
            raise ValueError(error)
        return text


def _stop(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes the pipes, and waits
        if process.poll() is None:
            process.kill()


def _environment() -> Any:
    """Returns what transformers renders templates in, as far as templates can tell."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; what is in it is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> str:
            return caller()

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:  # noqa: A002
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _serve() -> None:
    """Answers each line of standard input with a line, [text, None] or [None, error]."""
    import resource

    environment = _environment()
    templates: dict[str, Any] = {}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends the process, also inside C code
        try:
            request, text = json.loads(line), ""
            if "sources" in request:
                sources = request["sources"].items()
                templates = {name: environment.from_string(source) for name, source in sources}
            else:
                text = templates[request["name"]].render(request["variables"])
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"its text has {len(text)} characters, over {LONGEST_TEXT}")
            answer = json.dumps([text, None])
        except MemoryError:
            answer = json.dumps([None, f"it takes over {MEMORY_BYTES >> 20} MiB of memory"])
        except Exception as error:  # whatever a template brings about
            answer = json.dumps([None, f"{type(error).__name__}: {error}"[:500]])
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
