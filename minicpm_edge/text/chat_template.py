"""Chat templates are programs from files: they run here in a sandbox with a budget of time and size.

Jinja's sandbox keeps a template away from Python's internals but lets it loop, multiply strings and nest lists
without end. Before it is compiled, a template is rewritten so that each loop turn, call, filter, operator and
output is charged to a :class:`Budget`; functions that could make something huge in one go are not offered.

The threat is a model file from a stranger: one chat message must not hang the server or fill its memory. Of the 54
hostile templates in the tests, 31 ran past three seconds or 2 GiB in Jinja's immutable sandbox alone. A process with
system limits would be shorter, but costs a process start for each prompt, and Windows has no such limits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import count
from string import Formatter
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minicpm_edge.errors import UserError

# Characters; the longest templates in use have about 20,000.
MAX_SOURCE = 64 << 10
# Bytes of text and lists made while one template runs, roughly.
MAX_WORK = 128 << 20
MAX_SECONDS = 2.0
MAX_INTEGER_BITS = 256
MAX_INDENT = 64
# Bytes that a list takes for an item, and for an item with a text of its own.
ITEM_COST, PIECE_COST = 8, 64
LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# A name in the context that no template can spell.
BUDGET = "the budget"

# The filters and methods that published templates use. What takes a width (center, ljust) is not among them.
FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby indent int items join last length list
    lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim
    unique upper
"""
STRING_METHODS = """
    capitalize count endswith find isalnum isalpha isdigit islower isspace isupper join lower lstrip partition
    removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip title upper
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS.split()),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
# What a broken or hostile template can raise while it is compiled or run.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class Budget:
    """What one run of a template may still spend."""

    def __init__(self, turn_cost: int) -> None:
        self.turn_cost = turn_cost
        self.left = MAX_WORK
        self.deadline = time.monotonic() + MAX_SECONDS

    def charge(self, amount: int = 1) -> None:
        """Spend ``amount``; raises SecurityError when the template is past its size or time."""
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it makes too much text")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs longer than {MAX_SECONDS:g} s")

    def measure(self, value: object) -> None:
        """Charge the full size of ``value``, lists within lists included, however often they are shared.

        Raises:
            SecurityError: when that is past the budget, or a namespace lies within, which may grow later.
        """
        # Nearly every value is a text.
        if type(value) is str:
            self.charge(1 + len(value))
            return
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.charge(1 + len(item) if isinstance(item, str | bytes) else 1)
            if isinstance(item, list | tuple | set | frozenset):
                self.charge(ITEM_COST * len(item))
                waiting.extend(item)
            elif isinstance(item, dict):
                self.charge(ITEM_COST * len(item))
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, Namespace):
                raise SecurityError("it puts a namespace into a value")

    def iterate(self, values: Iterable[object]) -> Iterator[object]:
        """``values``, each turn charged with the length of the template: what its body can write literally."""
        for value in values:
            self.charge(self.turn_cost)
            yield value


def _budget(context: Context) -> Budget:
    found = context.parent[BUDGET]
    assert isinstance(found, Budget)
    return found


class _Generation(Extension):
    """``{% generation %}``, by which some published templates mark what the model says: the body, unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.charge()
        texts = isinstance(left, str | bytes), isinstance(right, str | bytes)
        if isinstance(left, int) and isinstance(right, int):
            exponent = min(abs(right), MAX_INTEGER_BITS + 1) if operator == "**" else 1
            if left.bit_length() * exponent > MAX_INTEGER_BITS or right.bit_length() > MAX_INTEGER_BITS:
                raise SecurityError("it computes with huge numbers")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            value, times = (right, left) if isinstance(left, int) else (left, right)
            if hasattr(value, "__len__"):
                size = 1 if isinstance(value, str) else ITEM_COST
                budget.charge(size * len(value) * max(0, min(times, MAX_WORK)))
        elif operator == "%" and any(texts):
            raise SecurityError("it formats text with %; use ~ instead")
        result = super().call_binop(context, operator, left, right)
        budget.measure(result)
        return result

    def call(self, context: Context, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        budget = _budget(context)
        budget.charge(budget.turn_cost)
        # Inside a loop or block, compiled templates hand each call the variables set there.
        named = {name: value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")}
        # A macro may be given a namespace: to it, that is one more variable.
        by_reference = Namespace if isinstance(obj, Macro) else ()
        given = [value for value in (*arguments, *named.values()) if not isinstance(value, by_reference)]
        budget.measure(given)
        # The sandbox wraps str.format.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if type(owner) is str and obj.__name__ == "format":
            return _format(budget, owner, arguments, named)
        for kind in (str, dict, list, tuple, int, float, bytes, type):
            if isinstance(owner, kind) and obj.__name__ not in METHODS.get(kind, ()):
                raise SecurityError(f"it calls {kind.__name__}.{obj.__name__}, which templates may not")
        if isinstance(owner, str):
            if obj.__name__ == "join" and arguments:
                arguments = (list(budget.iterate(arguments[0])),)
            budget.charge(_text_cost(obj.__name__, owner, arguments, named))
        result = super().call(context, obj, *arguments, **named)
        if obj is not Namespace:
            budget.measure(result)
        return result


def _format(budget: Budget, text: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> str:
    """``text.format(…)`` with plain fields only (``{}``, ``{0}``, ``{name}``): no widths, no attributes."""
    pieces = []
    positions = count()
    for literal, field, spec, conversion in Formatter().parse(text):
        budget.charge(PIECE_COST + len(literal))
        pieces.append(literal)
        if field is None:
            continue
        if spec or conversion or not (field == "" or field.isdecimal() or field.isidentifier()):
            raise SecurityError("it formats text with widths or attributes; only plain {} fields are allowed")
        value = named[field] if field.isidentifier() else arguments[int(field or next(positions))]
        budget.measure(value)
        pieces.append(str(value))
    return "".join(pieces)


def _text_cost(name: str, text: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> int:
    """A bound on what the method or filter ``name`` makes of ``text``, before it is made."""
    first = arguments[0] if arguments else named.get("old", named.get("sep"))
    if name == "replace":
        new = arguments[1] if len(arguments) > 1 else named.get("new")
        return len(text) + text.count(str(first)) * len(str(new))
    if name == "join":
        return len(text) * len(first) if isinstance(first, list) else 0
    if name in ("split", "rsplit"):
        return PIECE_COST * (text.count(first) if isinstance(first, str) and first else len(text) // 2)
    if name == "splitlines":
        return PIECE_COST * sum(map(text.count, LINE_ENDS))
    if name == "indent":
        return MAX_INDENT * text.count("\n")
    return ITEM_COST * len(text) if name in ("list", "reverse", "sort", "unique") else len(text)


# Jinja's own filters, called with the arguments that Jinja gives them.
_BUILTIN = Environment()


def _guarded(name: str) -> Callable[..., Any]:
    """Jinja's filter ``name``, charged for what it takes and makes."""

    @pass_context
    def run(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        budget = _budget(context)
        budget.charge()
        budget.measure([*arguments, *named.values()])
        for number in (*arguments, *named.values()):
            if name in ("indent", "round") and isinstance(number, int | str) and _size(number) > MAX_INDENT:
                raise SecurityError(f"it calls {name} with a huge argument")
        if name == "join":
            value = list(budget.iterate(value))
            budget.measure(value)
            separator, *_ = (*arguments, *named.values(), "")
            budget.charge(_text_cost(name, str(separator), [value], {}))
        elif isinstance(value, str):
            budget.charge(_text_cost(name, value, arguments, named))
        result = _BUILTIN.call_filter(name, value, arguments, named, context=context)
        if isinstance(result, Iterator):
            return budget.iterate(result)
        budget.measure(result)
        return result

    return run


def _size(value: int | str) -> int:
    return len(value) if isinstance(value, str) else abs(value)


@pass_context
def _measured(context: Context, value: Any) -> Any:
    _budget(context).measure(value)
    return value


@pass_context
def _tick(context: Context, value: Any) -> Any:
    _budget(context).charge()
    return value


@pass_context
def _iterate(context: Context, value: Any) -> Any:
    return value if isinstance(value, Undefined) else _budget(context).iterate(value)


@pass_context
def _concatenate(context: Context, parts: list[Any]) -> str:
    _budget(context).measure(parts)
    return "".join(map(str, parts))


@pass_context
def _output(context: Context, value: Any) -> str:
    _budget(context).measure(value)
    return str(value)


@pass_context
def _to_json(context: Context, value: Any, indent: int | None = None, **named: Any) -> str:
    budget = _budget(context)
    before = budget.left
    budget.measure(value)
    if indent is not None:
        if not 0 <= indent <= 16:
            raise SecurityError("it calls tojson with a huge indent")
        budget.charge((before - budget.left) * indent * _depth(value) // ITEM_COST)
    keys = ("ensure_ascii", "separators", "sort_keys")
    options = {"ensure_ascii": False} | {key: named[key] for key in keys if key in named}
    return json.dumps(value, indent=indent, **options)


def _depth(value: object) -> int:
    """How deep lists and dictionaries lie in ``value``; RecursionError for what is deeper than Python goes."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(_depth, inner), default=0)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message)[:500])


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:100])


def _rewrite(node: nodes.Node) -> nodes.Node:
    """``node`` with a charge at each place where a template can spend time or make something."""
    for name, child in node.iter_fields():
        if isinstance(child, nodes.Node):
            setattr(node, name, _rewrite(child))
        elif isinstance(child, list):
            setattr(node, name, [_rewrite(item) if isinstance(item, nodes.Node) else item for item in child])
    if isinstance(node, nodes.For):
        node.iter = _filtered(node.iter, "_iterate")
    elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.NSRef):
        node.node = _filtered(node.node, "_measured")
    elif isinstance(node, nodes.Compare):
        node.expr = _filtered(node.expr, "_tick")
    elif isinstance(node, nodes.Test):
        node.node = _filtered(node.node, "_tick")
    elif isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concatenate")
    elif (
        isinstance(node, nodes.List | nodes.Dict)
        or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    ):
        return _filtered(node, "_measured")
    return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@lru_cache(maxsize=1)
def _sandbox() -> _Sandbox:
    sandbox = _Sandbox(
        # As `transformers` sets them.
        trim_blocks=True,
        lstrip_blocks=True,
        # No arithmetic while compiling: the budget is not there yet.
        optimized=False,
        finalize=_output,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        cache_size=0,
    )
    sandbox.filters = {name: _guarded(name) for name in FILTERS.split()} | {
        "tojson": _to_json,
        "_measured": _measured,
        "_tick": _tick,
        "_iterate": _iterate,
        "_concatenate": _concatenate,
    }
    for name in ("lipsum", "cycler", "joiner"):
        del sandbox.globals[name]
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return sandbox


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    if len(source) > MAX_SOURCE:
        raise UserError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed")
    sandbox = _sandbox()
    try:
        tree = _rewrite(sandbox.parse(source))
        assert isinstance(tree, nodes.Template)
        return Template.from_code(sandbox, sandbox.compile(tree), sandbox.make_globals(None))
    except TEMPLATE_ERRORS as error:
        raise _refused(error) from error


def run_template(source: str, variables: Mapping[str, object]) -> str:
    """The text that template ``source`` makes of ``variables``, within the caps at the head of this file.

    Raises:
        UserError: when the template is broken, asks for more than it may, or calls ``raise_exception``.
    """
    template = _compile(source)
    try:
        return template.render({**variables, BUDGET: Budget(turn_cost=len(source))})
    except TEMPLATE_ERRORS as error:
        raise _refused(error) from error


def _refused(error: BaseException) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"the chat template failed: {reason[:300]}")
