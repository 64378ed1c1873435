"""Chat templates from files are hostile: they get no further than text, within a bound of time and memory."""

import time
import tracemalloc

import pytest

from minicpm_edge.errors import UserError
from minicpm_edge.text import chat_template
from minicpm_edge.text.chat_template import MAX_SOURCE, run_template


def grow(start: str, step: str, times: int = 99) -> str:
    """A template that replaces n.x, ``start`` at first, by ``step`` again and again."""
    return f"{{% set n = namespace(x={start}) %}}" + repeat(f"{{% set n.x = {step} %}}", times)


def repeat(body: str, times: int = 99999) -> str:
    return f"{{% for i in range({times}) %}}{body}{{% endfor %}}"


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "a long text in a loop": "{% set x %}{% for a in range(99999) %}"
    + "y" * 60_000
    + "{% endfor %}{% endset %}",
    "a variable in a loop": "{% set s = 'a' * 100000 %}{% for a in range(99999) %}{{ s }}{% endfor %}",
    "a repeated string": "{{ 'a' * 10**10 }}",
    "a repeated list": "{{ [1] * 10**10 }}",
    "a repetition built up": "{% set s = 'a' * 9999 * 9999 * 9999 %}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a power in steps": grow("7", "n.x * n.x"),
    "a shift by multiplication": "{{ 2 ** 100000 }}",
    "joining a string to itself": grow("'ab'", "n.x ~ n.x"),
    "adding a string to itself": grow("'ab'", "n.x + n.x"),
    "a list of itself": grow("[1]", "[n.x, n.x]"),
    "a tuple of itself": grow("1", "(n.x, n.x)"),
    "a dictionary of itself": grow("1", "{'x': n.x, 'y': n.x}"),
    "namespaces in namespaces": "{% set n = namespace(a=1) %}{% set n.a = n %}{{ n }}",
    "a namespace passed on": "{% set m = namespace(a=1) %}{% set n = namespace(x=m, y=m) %}",
    "replacing": grow("'a' * 9000", "n.x.replace('a', n.x)", times=9),
    "the filter replace": grow("'a' * 9000", "n.x | replace('a', n.x)", times=9),
    "joining": "{% set s = 'a' * 9000000 %}{% set t = s.join(['x'] * 99999) %}",
    "the filter join": "{% set s = 'a' * 9000000 %}{{ (['x'] * 99999) | join(s) }}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format with a width from outside": "{{ '{:{}}'.format(1, 1000000000) }}",
    "formatting a long text often": "{% set s = 'a' * 9000000 %}{% set t = ('{0}' * 99999).format(s) %}",
    "many fields": "{% set s = ('{0}{{' * 9000000).format(1) %}",
    "a namespace into itself by a macro": "{% macro f(m) %}{% set m.a = m %}{{ m.a }}{% endmacro %}"
    "{{ f(namespace(a=1)) }}",
    "a macro's arguments": "{% macro f() %}{{ varargs }}{% endmacro %}{{ f(namespace(a=1)) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "indent by name": "{{ 'a\nb' | indent(width=1000000000) }}",
    "tojson": "{{ [1] | tojson(indent=1000000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "an endless macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "many filters": "{{ 'a'" + "|upper" * 8000 + " }}",
    "many blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long template": "a" * (MAX_SOURCE + 1),
    "a map over a long range": repeat("{{ range(99999) | map('string') | list | length }}"),
    "comparing": "{% set a = range(99999) | list %}{% set b = a | reverse | sort %}" + repeat("{{ a == b }}"),
    "sorting": "{% for i in range(99999) %}{% set a = range(99999) | sort(reverse=true) %}{% endfor %}",
    "summing lists": "{% set a = [[1] * 999] * 999 %}" + repeat("{{ (a | sum(start=[])) | length }}"),
    "splitting": "{% set s = 'a' * 60000000 %}{% set t = s.split('a') %}",
    "splitting by name": "{% set s = 'a ' * 30000000 %}{% set t = s.split(maxsplit=10000000) %}",
    "splitting lines": "{% set s = '\r' * 60000000 %}{% set t = s.splitlines() %}",
    "a list of characters": "{% set s = 'a' * 60000000 %}{% set t = s | list %}",
    "indenting lines": "{% set s = '\n' * 60000000 %}{{ s | indent(60) }}",
    "joining a generator": "{% set s = 'a' * 60000000 %}{{ s.join(range(99999) | map('string')) }}",
    "replacing by name": "{% set s = 'a' * 60000000 %}{{ s | replace(new=s, old='a') }}",
    "slices": "{% set s = 'a' * 60000000 %}" + "{% if s[1:] %}{% endif %}" * 2000,
    "indented nested lists": "{% set n = namespace(a=[1] * 100000) %}{% for i in range(400) %}{% set n.a = [n.a] %}"
    "{% endfor %}{{ n.a | tojson(indent=16) }}",
    "dictsort": grow("{'x': 1}", "{'x': n.x | dictsort, 'y': n.x}"),
}
ESCAPES = {
    "the class": "{{ ''.__class__.__mro__ }}",
    "the class by a filter": "{{ '' | attr('__class__') }}",
    "the class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "a format string": "{{ '{0.__class__}'.format(1) }}",
    "an item of a format string": "{{ '{0[__class__]}'.format(1) }}",
    "a format map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "the budget": "{{ self['the budget'] }}",
    "changing a message": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% from '/etc/passwd' import x %}",
    "inheritance": "{% extends '/etc/passwd' %}",
}


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_within_a_bound(name, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(UserError, match="the chat template"):
            run_template(BOMBS[name], {})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 4.0  # one operation may run on, and tracing memory slows it down
    assert peak < 400 << 20


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_holds(name):
    try:
        text = run_template(ESCAPES[name], {"messages": [{"role": "user", "content": "x"}]})
    except UserError:
        return
    assert text in ("", "[Undefined]"), text


def test_broken_templates_say_so():
    for source in ("{{", "{% for %}", "{{ nothing.here.at.all }}", "{{ 1 / 0 }}", "{{ x | no_such_filter }}"):
        with pytest.raises(UserError, match="the chat template failed"):
            run_template(source, {})


def test_a_template_may_refuse():
    with pytest.raises(UserError, match="roles must alternate"):
        run_template("{{ raise_exception('roles must alternate') }}", {})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ none ~ [2] }}", "a1None[2]"),
        ("{{ 2 * 3 + 4 - 1 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 'ab' * 2 }}", "9 3 3 1024 abab"),
        ("{% for m in m %}{{ loop.index }}{{ m.a }}{% if not loop.last %},{% endif %}{% endfor %}", "1x,2y"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{{ ' a b '.strip().split(' ') | join('-') | upper }}", "A-B"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}", "b"),
        ("{{ m | selectattr('a', 'equalto', 'y') | map(attribute='a') | list | tojson }}", '["y"]'),
        ("{{ {'é': [1, none]} | tojson(indent=2) }}", '{\n  "é": [\n    1,\n    null\n  ]\n}'),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ f(x=1) }}", "<a><1>"),
        ("{% set n = namespace(i=0) %}{% for x in m %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}", "2"),
        ("{% generation %}answer{% endgeneration %}", "answer"),
        (
            "{{ nothing | default('x') }} {{ nothing is defined }} {{ m[0] is mapping }} {{ 'a' in 'cat' }}",
            "x False True True",
        ),
        ("{{ m[::-1][0].a }} {{ (m | length) > 1 }} {{ range(3) | list }}", "y True [0, 1, 2]"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{{ '<{}|{}>'.format('a', none) }}{{ '{1}{0}{x}{{}}'.format(1, 2.5, x=m[0].a) }}",
            "<a|None>2.51x{}",
        ),
        (
            "{% for x in m %}{% set n = namespace(t='') %}{% set n.t = n.t ~ x.a %}{{ n.t.upper() }}{% endfor %}",
            "XY",
        ),
        (
            "{% macro next(n) %}{% set n.i = n.i + 1 %}{{ n.i }}{% endmacro %}{% set n = namespace(i=0) %}"
            "{{ next(n) }}{{ next(n=n) }}",
            "12",
        ),
    ],
)
def test_what_published_templates_do_works(source, expected):
    assert run_template(source, {"m": [{"a": "x"}, {"a": "y"}]}) == expected
