"""What people find where they look for it: names, the version, configs of transformers, devices."""

import importlib
import inspect
import json
import subprocess
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
import transformers
from tiny_llama import config_of, write_folder

import fireq_jax
from fireq_jax import AutoModelForCausalLM, config_from_huggingface, generate
from fireq_jax.devices import find_device, placement

PACKAGES = (
    "fireq_jax", "fireq_jax.evaluation", "fireq_jax.generation", "fireq_jax.models", "fireq_jax.quantization",
    "pallas_kernels",
)  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_exports_is_there_and_documented(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    public = {name: getattr(module, name) for name in module.__all__}
    own = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isroutine(value)}
    assert [name for name, value in own.items() if not value.__doc__] == []


def test_importing_costs_no_transformers_and_no_orbax():
    program = "import fireq_jax, sys; print(fireq_jax.__version__, {'transformers', 'orbax', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{metadata.version('fireq-jax')} set()\n"


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "Olmo2", "Cohere2", "GptOss"])
def test_config_objects_of_transformers_are_read_without_a_word(kind, caplog):
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=4)
    assert config_from_huggingface(config) == config_from_huggingface(json.loads(config.to_json_string(False)))
    assert config_from_huggingface(config).num_layers == 4
    assert caplog.messages == []


def test_what_is_no_config_is_named():
    with pytest.raises(ValueError, match="config is a str; expected a config of transformers"):
        config_from_huggingface("meta-llama/Llama-3.2-1B")  # type: ignore[arg-type]


def test_a_model_goes_where_it_is_sent(tmp_path):
    folder = write_folder(tmp_path / "hf", config_of("gqa"))
    anywhere = AutoModelForCausalLM.from_pretrained(folder, dtype=jnp.float32)
    anywhere.save(tmp_path / "ours")
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    text = generate(anywhere, [[3, 4]], max_new_tokens=4, stop_strings=None).sequences.tolist()
    for name in ("hf", "ours"):
        for place in ({"device": "cpu:0"}, {"device": jax.devices()[0]}, {"sharding": replicated}):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=jnp.float32, **place)
            leaves = jax.tree.leaves(model)
            assert all(leaf.committed for leaf in leaves)
            assert all(leaf.sharding == place.get("sharding", leaf.sharding) for leaf in leaves)
        assert generate(model, [[3, 4]], max_new_tokens=4).sequences.tolist() == text


@pytest.mark.parametrize("name", ["", "gpu", "cpu:", "cpu:99", "cpu:x", "npu:0"])
def test_devices_that_are_not_there_are_named_beside_those_that_are(name):
    if name == "gpu" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=rf"device is '{name}'; expected one of cpu:0 \(cpu\)"):
        find_device(name)


def test_a_device_and_a_sharding_are_one_too_many():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="expected one of them"):
        placement("cpu", place)
    assert placement(None, None) is None
    assert fireq_jax.__version__
