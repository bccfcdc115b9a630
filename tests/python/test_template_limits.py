"""Chat templates of unknown origin: little time, little memory, typed errors, and no harm after."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moerun import errors
from moerun.chat import ChatTemplate
from moerun.template_process import process

HELLO = [{"role": "user", "content": "Hello"}]


def rendered(source, **variables):
    return ChatTemplate(source, "test").render(HELLO, **variables)


LARGE = {
    "a text times a number": "{{ 'a' * 3 * 10**9 }}",
    "a width of format": "{{ '{:>3000000000}'.format(1) }}",
    "a width of percent": "{{ '%3000000000d' % 1 }}",
    "a width from an argument": "{{ '%*d' | format(10**9, 1) }}",
    "center": "{{ 'a'.center(3 * 10**9) }}",
    "a list times a number": "{{ [0] * 10**9 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(40) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "indent of tojson": "{{ [1] | tojson(indent=3 * 10**9) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "join": "{{ range(99999) | join('x' * 10**6) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "joiner": "{{ joiner('x' * 10**9)() }}",
    "a number from outside": "{{ 'a' * number }}",
    "output": "{% for i in range(9999) %}{% for j in range(999) %}aaaaaaaaaaaaaaaaaa{% endfor %}"
    "{% endfor %}",
}
LONG = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "lists that share their parts": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "a power that is known before": "{{ 10 ** (10 ** 8) }}",
}


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE.keys())
def test_a_template_that_takes_much_memory_is_refused(source):
    with pytest.raises(errors.FormatError, match=r"test.*(MiB of memory|characters)"):
        rendered(source, number=10**10)
    assert rendered("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize("source", LONG.values(), ids=LONG.keys())
def test_a_template_that_computes_long_is_refused(source):
    with pytest.raises(errors.FormatError, match=r"test.*computes longer than 1 s"):
        rendered(source)
    assert rendered("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{% macro a(b, b) %}{% endmacro %}",
        "{{ dict(a=1, a=2) }}",
        "{% continue %}",
        "{% macro a() %}{% break %}{% endmacro %}",
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
        "{% if 1 %}" * 120 + "{% endif %}" * 120,
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ " + "not " * 20000 + "1 }}",
        "{{ 1" + "|string" * 5000 + " }}",
        "{{ " + "1" * 5000 + " }}",
        "{{ (10 ** 5000) | string }}",
        "{% set x %}" * 500 + "{% endset %}" * 500,
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{{ a" + ".b" * 20000 + " }}",
        "{% debug %}",
        "{{ \u0660 }}",
        "a" * (1 << 21),
    ],
    ids=range(17),
)
def test_what_python_cannot_compile_is_a_format_error_at_once(source):
    with pytest.raises(errors.FormatError, match="here"):
        ChatTemplate(source, "here")


@pytest.mark.parametrize(
    "source",
    [
        "{% import 'x' as y %}",
        "{% include '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace(_x=1) %}",
        "{{ range(10**9) }}",
        "{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
    ],
)
def test_a_template_reaches_nothing_outside(source):
    with pytest.raises(errors.FormatError, match="test"):
        rendered(source)


def test_half_characters_and_long_refusals_become_messages():
    assert rendered("{{ '\\ud800' }}") == "\ud800"  # encoding refuses it
    with pytest.raises(errors.InvalidArgumentError) as caught:
        rendered("{{ raise_exception('\\ud800' + 'a' * 10**7) }}")
    assert len(str(caught.value).encode()) < 3000


@pytest.mark.parametrize(
    "messages",
    [[], None, 5, "text", {"role": "user"}, [None], ["text"], [1], [{"role": {1}}, None]],
)
def test_what_is_no_conversation_is_an_argument_error(messages):
    with pytest.raises(errors.InvalidArgumentError):
        ChatTemplate("{{ messages }}", "test").render(messages)


def test_values_that_are_not_plain_are_placeholders():
    assert rendered("{{ messages[0].content }}{{ x }}", x=object()) == "Hello<object>"
    nested = []
    nested.append(nested)
    with pytest.raises(errors.InvalidArgumentError, match="nests"):
        rendered("{{ x }}", x=nested)


def test_a_process_that_was_killed_is_started_again():
    template = ChatTemplate("{{ messages[0].content }}", "test")
    assert template.render(HELLO) == "Hello"
    os.kill(process._child.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert template.render(HELLO) == "Hello"


def test_threads_share_the_process():
    template = ChatTemplate("{{ messages[0].content }}{{ n }}", "test")
    texts = {}

    def work(number):
        texts[number] = [template.render(HELLO, n=number) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: [f"Hello{number}"] * 20 for number in range(8)}


AFTER_FORK = """
import os, sys
from moerun.chat import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}", "test")
hello = [{"role": "user", "content": "Hello"}]
assert template.render(hello) == "Hello"
child = os.fork()
texts = [template.render(hello) for _ in range(50)]
if child == 0:
    os._exit(0 if texts == ["Hello"] * 50 else 1)
assert texts == ["Hello"] * 50
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_a_process_that_was_forked_has_a_renderer_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", AFTER_FORK], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("done\n", "")
