"""Messages to a prompt, by the chat template of a GGUF.

The template comes with the model, so it is an untrusted program. jinja2's sandbox denies it Python's internals; this
module bounds its memory and time: every operation that makes a text larger is checked before it runs, the output is
counted as it is produced, and a deadline applies. A template gets what `transformers` gives it
(https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import datetime
import functools
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.commands.common import ChatMessage
from protocol.errors import InvalidParamsError

MAX_SOURCE_CHARS = 256 * 1024
MAX_TEXT_CHARS = 4 << 20
"""Of the prompt, and of every text that the template builds."""
TIMEOUT_S = 2.0
_MAX_WIDTH = 1000
_WIDE = re.compile(r"\d{4,}|\{[^{}]*\{|\*")
"""In a format string: a large width, or a width that is an argument."""
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby int items join last length list lower map "
    "max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim unique upper "
    "wordcount indent truncate"
)
_TRACED = (str(Path(jinja2.__file__).parent), __file__)
"""The files of functions that may be stopped, besides those of templates."""
_GLOBALS = "cycler dict joiner namespace range"


class _LimitError(Exception):
    """Raised inside a template that takes too much memory."""


class _DeadlineError(BaseException):
    """Raised inside a template that takes too much time; jinja2's compiler catches every Exception."""


class _TemplateRefusedError(Exception):
    """Raised by a template's `raise_exception`."""


def render_chat(
    template: str | None,
    messages: Sequence[ChatMessage],
    *,
    bos_token: str = "",
    eos_token: str = "",
    timeout_s: float = TIMEOUT_S,
) -> str:
    """The prompt for these messages, up to the start of the model's answer.

    Raises InvalidParamsError if the model has no template, or the template is broken, refuses these messages, or takes
    too much memory or time.
    """
    if template is None:
        raise InvalidParamsError("the model has no chat template; give `prompt` instead of `messages`")
    if len(template) > MAX_SOURCE_CHARS:
        raise InvalidParamsError(
            f"the model's chat template has {len(template)} characters, allowed are {MAX_SOURCE_CHARS}; give `prompt` "
            "instead of `messages`"
        )
    try:
        with _deadline(timeout_s):
            parts = _compiled(template).generate(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
            return _joined(parts)
    except _TemplateRefusedError as err:
        raise InvalidParamsError(f"the model's chat template refuses these messages: {str(err)[:500]}") from None
    except (_LimitError, _DeadlineError) as err:
        raise InvalidParamsError(f"the model's chat template was stopped: {err}; give `prompt` instead") from None
    except Exception as err:  # an untrusted program may raise anything
        raise InvalidParamsError(
            f"the model's chat template is broken: {type(err).__name__}: {str(err)[:500]}; give `prompt` instead"
        ) from None


def _joined(parts: Iterable[str]) -> str:
    """Join the parts. Raises _LimitError if the text is too large."""
    found: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        _check_size(size)
        found.append(part)
    return "".join(found)


def _check_size(size: int) -> None:
    if size > MAX_TEXT_CHARS:
        raise _LimitError(f"it builds a text of more than {MAX_TEXT_CHARS} characters")


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _DeadlineError in the template, jinja2 or this module once the time is over; in this thread."""
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        # Python drops an error that is raised in a finalizer, or while a generator is freed; the trace ends with it.
        name = frame.f_code.co_filename
        is_template = name == "<template>"
        if not is_template and (not name.startswith(_TRACED) or frame.f_code.co_flags & inspect.CO_GENERATOR):
            return None
        if time.monotonic() > end:
            raise _DeadlineError(f"it ran for more than {seconds:g} s")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _CheckedCode(CodeGenerator):
    """Compiles `a ~ b` to a call that checks the size."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 -- jinja2's name
        self.write("environment.concat((")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CheckedCode
    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def concat(self, parts: Iterable[object]) -> str:
        return _joined(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    _check_size(len(many) * times)
            _check_numbers(left, right)
        elif operator == "**":
            _check_numbers(left, right)
            if isinstance(right, int | float) and abs(right) > 64:
                raise _LimitError("it raises a number to a power above 64")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
                _check_size(len(owner) * max([1, *(arg for arg in (*args, *kwargs.values()) if isinstance(arg, int))]))
            elif name == "replace":
                return _replace(owner, *args, **kwargs)
            elif name == "join":
                return _join(args[0] if args else (), owner)
            elif name in ("format", "format_map"):
                _check_format(owner, (*args, *kwargs.values()))
            elif name == "translate":
                raise _LimitError("it calls str.translate")
        return super().call(context, obj, *args, **kwargs)


def _check_numbers(*values: object) -> None:
    if any(isinstance(value, int) and abs(value) > 1 << 64 for value in values):
        raise _LimitError("it multiplies numbers of more than 64 bits")


def _check_format(pattern: str, values: object) -> None:
    """Allow plain patterns only: the text grows by its arguments and nothing else."""
    if _WIDE.search(pattern):
        raise _LimitError("it formats with a width above 999, or with one that it computes")
    items = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    _check_size(
        (len(pattern) // 2 + 1) * max((len(str(item)) for item in items), default=0) + len(pattern) * _MAX_WIDTH
    )


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(s), str(old), str(new)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _check_size(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, times)


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise _LimitError("it joins by attribute, which is not offered")
    parts: list[str] = []
    size = 0
    for item in value:
        parts.append(str(item))
        size += len(parts[-1]) + len(d)
        _check_size(size)
    return d.join(parts)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), _MAX_WIDTH)
    _check_size(len(s) + (s.count("\n") + 1) * len(pad))
    lines = s.split("\n")
    done = [pad + line if (line or blank) and (index or first) else line for index, line in enumerate(lines)]
    return "\n".join(done)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else min(int(indent), 16),
        sort_keys=bool(options.get("sort_keys")),
        separators=options.get("separators"),
    )
    return _joined(encoder.iterencode(value))


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRefusedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(str(pattern)[:100])


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    found = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], cache_size=0)
    filters: dict[str, Callable[..., Any]] = {name: found.filters[name] for name in _FILTERS.split()}
    found.filters = filters | {"replace": _replace, "join": _join, "indent": _indent, "tojson": _tojson}
    found.globals = {name: found.globals[name] for name in _GLOBALS.split()} | {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return found


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)
