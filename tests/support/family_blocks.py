"""Blocks of the tiny families, one of each kind of layer that a family has."""

import functools

import jax.numpy as jnp
from tiny_families import CASES, family_fields
from tiny_llama import weights_of

from fireq_jax import ModelConfig
from fireq_jax.models.architectures import config_from_huggingface, tensor_table
from fireq_jax.models.block import Block


def kinds() -> list[tuple[str, int]]:
    """Case, and the first layer of each kind that its model has."""
    configs = {case: config_from_huggingface(family_fields(case)) for case in CASES}
    return [
        (case, index)
        for case, config in configs.items()
        for index in sorted({*map(config.first_like, range(config.num_layers))})
    ]


def block_of(case: str, index: int) -> tuple[ModelConfig, Block]:
    """The config of a case's model, and one of its blocks in float32."""
    config, table, tensors = _model_of(case)
    prefix = table.prefix.format(index=index)
    block = {
        ours: source.read(*(tensors[prefix + name] for name in source.names)) for ours, source in table.block.items()
    }
    return config, {name: jnp.asarray(array, jnp.float32) for name, array in block.items()}


@functools.cache
def _model_of(case: str):
    fields = family_fields(case)
    config = config_from_huggingface(fields)
    return config, tensor_table(fields, config), weights_of(fields)
