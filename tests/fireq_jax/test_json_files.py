"""JSON files: what is none, or says two things at once, is refused with the file's name."""

import json
import os

import pytest

from fireq_jax.json_files import errors_name, is_file, read_json, write_json


def test_an_object_comes_back(tmp_path):
    fields = {"a": [1, 2.5, None, True], "b": {"c": "ü"}, "large": 10**30}
    write_json(tmp_path / "a.json", fields)
    assert read_json(tmp_path / "a.json") == fields


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", "is not valid JSON"),
        ("[]", "holds a JSON list; expected an object"),
        ("null", "holds a JSON NoneType"),
        ('{"a": NaN}', "'a' is nan or out of range; expected a finite number"),
        ('{"a": -Infinity}', "'a' is -inf"),
        ('{"a": 1e999}', "'a' is inf"),
        ('{"a": [1, 1e999]}', "'a' is inf"),
        ('{"a": %s}' % ("9" * 5000), "'a' is inf or out of range"),
        ('{"b": {"a": -%s}}' % ("9" * 5000), "'a' is inf or out of range"),
        ('{"a": 1, "a": 2}', "'a' is there twice, as 1 and 2"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, text, quoted):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=quoted) as refusal:
        read_json(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 200


def test_a_key_that_says_the_same_twice_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1], "a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON.*utf-8"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "link to itself", "device", "too long a name"])
def test_what_is_no_file(tmp_path, kind):
    """A pipe would wait for a writer for ever, and a device never end."""
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "too long a name":
        path = tmp_path / ("a" * 300)
    else:
        path.symlink_to({"dangling link": "nowhere", "link to itself": path, "device": os.devnull}[kind])
    for read in (is_file, read_json):
        with pytest.raises(ValueError, match=r"expected a file|cannot be read") as refusal:
            read(path)
        assert str(path) in str(refusal.value)


def test_a_link_to_a_file_is_one(tmp_path):
    (tmp_path / "blob").write_text(json.dumps({"a": 1}))
    (tmp_path / "a.json").symlink_to("blob")
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert not is_file(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


def test_errors_name_the_file_that_they_are_about(tmp_path):
    with pytest.raises(ValueError, match=r"^/a/b: what$"), errors_name("/a/b"):
        raise ValueError("what")
    with pytest.raises(KeyError), errors_name(tmp_path):
        raise KeyError("a mistake of ours, not of the file")
