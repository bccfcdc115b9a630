"""The child process that renders chat templates; run as a script by `template_process`.

It imports nothing of moerun, so that it starts in 70 ms. It reads requests from standard input and
writes answers to standard output until standard input ends. A request is a length of 8 bytes and a
marshalled dict; an answer is a status of one byte, a length of 8 bytes and a text.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

if __name__ == "__main__":  # the folders with Jinja and what it imports
    sys.path += sys.argv[1:]

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

DONE, REFUSED, FAILED, INVALID = b"d", b"r", b"f", b"i"
_CACHED = 8  # templates


class _RefusedError(Exception):
    """The template itself called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """Accepts {% generation %} ... {% endgeneration %}, which only marks text for training."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the body of the tag as a block of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text_of")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text_of(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` of templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of templates; as in transformers, no name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters of HTML, which a model has not seen in training.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_templates: dict[str, jinja2.Template] = {}


def _template(source: str) -> jinja2.Template:
    template = _templates.pop(source, None)
    if template is None:
        template = _environment().from_string(source)
    while len(_templates) >= _CACHED:
        del _templates[next(iter(_templates))]
    _templates[source] = template
    return template


def _rendered(template: jinja2.Template, variables: dict[str, Any], most: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > most:
            raise ValueError(f"it writes more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any]) -> tuple[bytes, str]:
    """Return the status and the text for a request.

    A request has the `source` of a template. With `variables` it asks for the text that the
    template makes of them, of at most `most_characters`; without, whether the template is valid.
    """
    try:
        template = _template(request["source"])
    except jinja2.TemplateSyntaxError as error:
        return INVALID, f"line {error.lineno} of the chat template: {error.message}"
    except MemoryError:
        raise
    except Exception as error:  # Python refuses what Jinja makes of a template
        return INVALID, f"the chat template cannot be compiled: {_described(error)}"
    if request["variables"] is None:
        return DONE, ""
    try:
        return DONE, _rendered(template, request["variables"], request["most_characters"])
    except _RefusedError as error:
        return REFUSED, str(error)[:2000]
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it can fail in any way
        return FAILED, _described(error)


def _described(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:2000]}"
    except Exception:
        return type(error).__name__


def _limit(kind: int, most: float) -> None:
    _, hard = resource.getrlimit(kind)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is there already
        resource.setrlimit(kind, (int(most) if hard < 0 else min(int(most), hard), hard))


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # the template has no way to them
        os.dup2(nothing, descriptor)
    _limit(resource.RLIMIT_CORE, 0)
    while len(size := requests.read(8)) == 8:
        request = marshal.loads(requests.read(int.from_bytes(size, "little")))
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, used.ru_utime + used.ru_stime + request["most_seconds"] + 1)
        _limit(resource.RLIMIT_AS, request["most_bytes"])
        try:
            status, text = answer(request)
            data = text.encode("utf-8", "surrogatepass")
        except MemoryError:
            os._exit(3)
        answers.write(status + len(data).to_bytes(8, "little") + data)
        answers.flush()


if __name__ == "__main__":
    _serve()
