"""How commands end."""

import argparse
import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading

import jax
import pytest

import fireq_jax
from fireq_jax.command_line import add_common_options, check_interrupted, exit_code


def test_a_command_that_ran_ends_with_0(capsys):
    assert exit_code("fireq-test", lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


def test_a_command_computes_on_the_device_that_was_asked_for(capsys):
    seen = []
    assert exit_code("fireq-test", lambda: seen.append(jax.config.jax_default_device), device="cpu:0") == 0
    assert seen == [jax.devices("cpu")[0]]
    assert jax.config.jax_default_device is None
    assert exit_code("fireq-test", lambda: None, device="cpu:999") == 2
    assert "device is 'cpu:999'; expected one of cpu:0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, FileNotFoundError, ImportError])
def test_what_users_can_put_right_is_one_line(capsys, kind):
    def run():
        raise kind("x is 3; expected 4")

    assert exit_code("fireq-test", run) == 2
    assert capsys.readouterr() == ("", "fireq-test: x is 3; expected 4\n")


@pytest.mark.parametrize(
    ("arguments", "shown"), [([], ["warning"]), (["--verbose"], ["cost", "warning"]), (["--quiet"], [])]
)
def test_as_much_is_said_as_is_asked_for(arguments, shown, capsys):
    """Also after Orbax, whose import sets up a handler for the root; nothing stays behind."""
    importlib.import_module("orbax.checkpoint")
    parse = argparse.ArgumentParser()
    add_common_options(parse)
    before = logging.getLogger().handlers[:], logging.getLogger("fireq_jax").level

    def run():
        logging.getLogger("fireq_jax.something").info("cost")
        logging.getLogger("fireq_jax.something").warning("warning")
        logging.getLogger("absl").info("of others")

    assert exit_code("fireq-test", run, parse.parse_args(arguments).log_level) == 0
    assert capsys.readouterr().err.splitlines() == shown
    assert (logging.getLogger().handlers, logging.getLogger("fireq_jax").level) == before


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("fireq-convert", "checkpoints_convert.convert_and_quantize"),
        ("fireq-export", "checkpoints_convert.export_command"),
        ("fireq-generate", "fireq_jax.generation.command"),
        ("fireq-evaluate", "fireq_jax.evaluation.command"),
    ],
)
def test_every_command_says_its_version(command, module, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main(["--version"])
    assert capsys.readouterr().out.startswith(f"{command} {fireq_jax.__version__} (jax {jax.__version__}, Python 3.")


def test_an_interrupted_command_says_so(capsys):
    def run():
        raise KeyboardInterrupt

    assert exit_code("fireq-test", run) == 130
    assert capsys.readouterr() == ("", "fireq-test: interrupted\n")


def test_too_little_memory_is_one_line(capsys):
    def run():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore.")

    assert exit_code("fireq-test", run) == 2
    assert capsys.readouterr() == ("", "fireq-test: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n")


def test_other_errors_have_a_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code("fireq-test", lambda: print(1 // 0))


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_seen_enough_ends_a_command(monkeypatch, flush):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as text:
        monkeypatch.setattr(sys, "stdout", text)
        assert exit_code("fireq-test", lambda: print("text", flush=flush)) == 141
        print("more", flush=True)


@pytest.fixture
def interruptible():
    """As in a terminal, also where the tests were started to ignore Ctrl-C, as a shell's jobs in the background are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_that_was_lost_is_raised_again(interruptible, capsys):
    def run():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        check_interrupted()
        print("went on")

    before = signal.getsignal(signal.SIGINT)
    assert exit_code("fireq-test", run) == 130
    assert capsys.readouterr() == ("", "fireq-test: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before
    check_interrupted()


def test_a_second_interruption_ends_the_process(interruptible):
    program = """
import contextlib, signal
from fireq_jax.command_line import add_common_options, check_interrupted, exit_code
def run():
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
exit_code("fireq-test", run)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_interruptions_are_left_to_whom_they_belong():
    """A thread can set no handler, and a command that was started to ignore Ctrl-C does."""
    found = []

    def run():
        found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=exit_code, args=("fireq-test", run))
    thread.start()
    thread.join()
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert exit_code("fireq-test", run) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [before, signal.SIG_IGN]


@pytest.mark.parametrize(("code", "printed"), [(0, "text\ntorn down\n"), (2, "text\ntorn down\n"), (130, "text\n")])
def test_an_interrupted_process_is_left_as_it_is(code, printed):
    program = (
        "import atexit; from fireq_jax.command_line import leave; atexit.register(print, 'torn down'); "
        f"print('text'); leave({code})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, printed)
