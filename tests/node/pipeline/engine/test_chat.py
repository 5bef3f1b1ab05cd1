"""Chat templates: what they may expect, and what they may not do."""

import gc
import resource
import time
from collections.abc import Iterator

import pytest

from node.pipeline.engine.chat import MAX_SOURCE_CHARS, render_chat
from protocol.commands.common import ChatMessage
from protocol.errors import InvalidParamsError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [ChatMessage(role="user", content="Hello & <hi>")]


def test_chatml() -> None:
    assert render_chat(CHATML, HELLO) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello & <hi><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{% if true %}\n   {% if true %}\nx{% endif %}{% endif %}", "x"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello & <hi>"}]'),
        ("{{ messages[0]['content'] | trim | upper | replace('HELLO', 'Bye') }}", "Bye & <HI>"),
        ("{{ 'a'.split(',') | join('-') ~ 'é' }}{{ ','.join(['x', 'y']) }}", "aéx,y"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% if tools is none and tools is not string %}no tools{% endif %}", "no tools"),
        ("{{ '%s of %03d' % ('a', 7) }} {{ '{}-{}'.format(1, 2) }}", "a of 007 1-2"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ messages | map(attribute='role') | list | length }}", "1"),
    ],
)
def test_what_templates_expect(template: str, expected: str) -> None:
    assert render_chat(template, HELLO, bos_token="<s>", eos_token="</s>") == expected


def test_the_date_is_given() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", HELLO) == time.strftime("%Y")


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(InvalidParamsError, match="refuses these messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", HELLO)


def test_no_template() -> None:
    with pytest.raises(InvalidParamsError, match="no chat template"):
        render_chat(None, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum(5) }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "(" * 100_000,
        "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
        "x" * (MAX_SOURCE_CHARS + 1),
    ],
)
def test_a_broken_template_is_a_clear_error(template: str) -> None:
    if template.startswith("(("):
        assert render_chat(template, HELLO) == template
        return
    with pytest.raises(InvalidParamsError, match="chat template"):
        render_chat(template, HELLO)


HUGE = 10**9
HOSTILE = [
    f"{{{{ 'x' * {HUGE} }}}}",
    f"{{{{ {HUGE} * [1] }}}}",
    f"{{{{ 'x'.center({HUGE}) }}}}",
    f"{{{{ 'x'.zfill({HUGE}) }}}}",
    f"{{{{ 'x' | center({HUGE}) }}}}",
    f"{{{{ '%0{HUGE}d' % 1 }}}}",
    f"{{{{ '%*d' % ({HUGE}, 1) }}}}",
    f"{{{{ '{{:>{HUGE}}}'.format(1) }}}}",
    f"{{{{ '{{:>{{w}}}}'.format(1, w={HUGE}) }}}}",
    "{{ 9 ** (9 ** 9) }}",
    f"{{{{ range({HUGE}) | list }}}}",
    f"{{{{ [1, 2] | tojson(indent={HUGE}) | replace('', 'x' * 4000000) }}}}",
    "{% set x = 'x' * 40000 %}{{ x.replace('x', x) }}",
    "{% set x = 'x' * 40000 %}{{ x | replace('', x) }}",
    "{% set x = 'x' * 4000000 %}{{ x.join([x, x]) }}",
    "{% set x = 'x' * 4000000 %}{{ [x, x, x] | join }}",
    "{% set x = 'x\n' * 40000 %}{{ x | indent(x) }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_cannot_take_all_memory(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidParamsError, match="chat template"):
        render_chat(template, HELLO)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(99) %}{{ f(n) if n < 0 }}{% endfor %}{% endmacro %}"
        "{% for a in range(99999) %}{{ f(1) }}{% endfor %}",
    ],
)
def test_a_template_cannot_take_all_time(template: str) -> None:
    with pytest.raises(InvalidParamsError, match=r"ran for more than 0\.1 s"):
        render_chat(template, HELLO, timeout_s=0.1)


class SlowToFree:
    """A cycle whose finalizer runs whenever the garbage collector does."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        sum(n for n in range(50))
        if alive:
            SlowToFree()


alive: list[bool] = []


@pytest.fixture
def garbage() -> Iterator[None]:
    """The collector runs all the time, and frees what takes a while to be freed."""
    thresholds = gc.get_threshold()
    alive.append(True)
    for _ in range(20):
        SlowToFree()
    gc.set_threshold(5)
    yield
    alive.clear()
    gc.set_threshold(*thresholds)
    gc.collect()


@pytest.mark.usefixtures("garbage")
def test_the_deadline_holds_wherever_the_template_is_when_it_passes() -> None:
    """An error that is raised while a generator or another object is freed is lost."""
    frees_generators = "{% for a in range(99999) %}{{ ['a', 'b'] | map('upper') | first }}{% endfor %}"
    for timeout_ms in range(5, 25):
        with pytest.raises(InvalidParamsError, match="ran for more than"):
            render_chat(frees_generators, HELLO, timeout_s=timeout_ms / 1000)
