"""Chat templates are rendered as transformers does, and stopped when they take too much."""

import resource
import signal

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fireq_jax.generation import chat

MESSAGES = [{"role": "user", "content": "hi"}]
LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='a') %}{% for i in range(100000) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"


def render(template) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    return chat.render(tokenizer, MESSAGES, "/models/some")


@pytest.fixture(autouse=True)
def limits():
    """Those of the process are as they were."""
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_makes_the_prompt():
    assert render("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}") == "[user]hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "rejects the messages: division by zero"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "maximum recursion depth"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth"),
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('no\nsystem role') }}", "rejects the messages: no system role"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ 'a' * 10**10 }}", "takes more than 536,870,912 bytes"),
        ("{{ 'a'|center(10**10) }}", "takes more than 536,870,912 bytes"),
        (DOUBLING, "takes more than 536,870,912 bytes"),
        ("{{ 'a' * 10000001 }}", "makes more than 10,000,000 characters"),
    ],
)
def test_a_bad_template_is_one_line_that_names_the_model(template, reason):
    with pytest.raises(ValueError, match=r"^/models/some: the chat template .+$") as error:
        render(template)
    assert reason in str(error.value)


@pytest.mark.parametrize("body", ["", "xxxx"])
def test_a_template_that_loops_on_is_stopped(monkeypatch, body):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"^/models/some: the chat template is not done after 0\.2 s$"):
        render(LOOPS.replace("BODY", body))
