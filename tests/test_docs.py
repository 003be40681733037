"""The documents: numbers as measured, links that lead somewhere, commands and Python that run."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert_and_quantize, export_command
from fireq_jax.evaluation import command as evaluate_command
from fireq_jax.generation import command as generate_command

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny_llama"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
WITH_PYTHON = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]
PARSERS = {
    "fireq-convert": convert_and_quantize.parser,
    "fireq-evaluate": evaluate_command.parser,
    "fireq-export": export_command.parser,
    "fireq-generate": generate_command._parser,
}
# What a document says of a large model, and what the embedded one does instead.
SMALLER = {
    "samples=128": "samples=2",
    "sequence_length=1024": "sequence_length=32",
    "max_new_tokens=64": "max_new_tokens=8",
    "recipes.fireq_plus()": "recipes.fireq()",
}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page):
    """Lines of a page's shell blocks, and code in its text, that are this project's commands with arguments."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fenced(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`(fireq-[a-z]+ [^`]+)`", text)
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] in PARSERS]


def parses(name, arguments):
    """Whether a command takes the arguments, or ends by them as --version does."""
    try:
        PARSERS[name]().parse_args(arguments)
    except SystemExit as end:
        return not end.code
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the documents' paths are: one layer of the embedded model, its texts, and the model converted."""
    folder = tmp_path_factory.mktemp("docs")
    model = folder / "meta-llama" / "Llama-3.1-8B-Instruct"
    shutil.copytree(TINY, model)
    (folder / "llama-8b").symlink_to(model)
    tensors = load_file(TINY / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(first, model / "model.safetensors")
    for name, changes in (
        ("config.json", {"num_hidden_layers": 1}),
        ("tokenizer_config.json", {"chat_template": CHAT}),
    ):
        fields = json.loads((TINY / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(fields | changes), encoding="utf-8")
    text = (TINY / "calibration.txt").read_text(encoding="utf-8")
    (folder / "text.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    shutil.copyfile(TINY / "evaluation.txt", folder / "validation.txt")
    return folder


def test_tables_are_as_measured():
    """``python docs/measurements/tables.py`` has been run."""
    tables = runpy.run_path(str(ROOT / "docs" / "measurements" / "tables.py"))
    used = [page for page in tables["documents"]() if tables["MARKED"].search(page.read_text(encoding="utf-8"))]
    assert len(used) > 3
    for page in used:
        text = page.read_text(encoding="utf-8")
        assert tables["filled"](text) == text, f"{page} is not as measured"


def test_a_number_that_is_not_measured_is_refused():
    tables = runpy.run_path(str(ROOT / "docs" / "measurements" / "tables.py"))
    with pytest.raises(ValueError, match=r"'decode 3 x 5' is not measured; expected one of \['prefill"):
        tables["filled"]('<!-- measured: whole_model.csv llama3-8b rows="decode 3 x 5" -->\n<!-- end -->')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_exist(page):
    """Links to files of this repository, and each command's options."""
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"
    for name, *arguments in commands(page):
        assert parses(name, arguments), f"{page}: {name} {shlex.join(arguments)}"


@pytest.mark.slow
def test_readme_commands_run(folder, monkeypatch, capsys):
    """The README's own way from a checkpoint to text, by the recipe that needs no calibration."""
    monkeypatch.chdir(folder)
    lines = commands(ROOT / "README.md")
    assert [name for name, *_ in lines[:3]] == ["fireq-convert", "fireq-generate", "fireq-evaluate"]
    convert, generate = (arguments for _, *arguments in lines[:2])
    assert convert_and_quantize.main([*convert, "--recipe", "w4a16"]) == 0, capsys.readouterr().err
    fewer = ["--max-new-tokens", "8", "--top-p", "0.9", "--no-stream"]
    assert generate_command.main([*generate, *fewer]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page, folder, monkeypatch, capsys):
    """A page's Python from top to bottom, as one program."""
    monkeypatch.chdir(folder)
    if not (folder / "llama-8b-fireq").exists():
        arguments = ["--model", "llama-8b", "--output", "llama-8b-fireq", "--recipe", "w4a16"]
        assert convert_and_quantize.main(arguments) == 0
    names: dict[str, object] = {}
    for block in fenced(page, "python"):
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, str(page), "exec"), names)
