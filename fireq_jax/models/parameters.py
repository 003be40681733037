"""From a block's tensors to the parameters of a layer, and into a model."""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from fireq_jax.compilation import COMPILE_QUICKLY
from fireq_jax.models.block import FLOAT32, fuse_block
from fireq_jax.models.coded_weight import BlockTensor, CodedWeight, as_float
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels.quantized_tensor import QuantizedTensor, over_stack, quantize

Parameter = Array | QuantizedTensor
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def layer_parameters(
    block: Mapping[str, BlockTensor], index: int, quantization: QuantizationConfig, dtype: jax.typing.DTypeLike
) -> dict[str, Parameter]:
    """Parameters of layer ``index`` by full name, quantized as the config says.

    ``block`` may hold ``self_attn.post_rope_scale`` and ``self_attn.key_offset`` (float32 [kv_heads, H]) besides its
    weights. Linear layers that it holds as codes keep these, unless they stay float.
    """
    parameters: dict[str, Parameter] = {}
    for name, tensor in fuse_block(block).items():
        linear = f"layers.{index}.{name.removesuffix('.weight')}"
        quantized = name.endswith("proj.weight") and not quantization.keeps_float(linear)
        if quantized and isinstance(tensor, CodedWeight):
            parameters[f"{linear}.weight"] = tensor.pack(quantization.group_size, quantization.scale_dtype)
        elif quantized:
            own = quantization.for_linear(linear)
            parameters[f"{linear}.weight"] = quantize_linear(jnp.asarray(as_float(tensor)), own)
        else:
            wide = any(part in name for part in FLOAT32)
            array = jnp.asarray(as_float(tensor))
            parameters[f"layers.{index}.{name}"] = array.astype(jnp.float32 if wide else dtype)
    return parameters


def pack_codes(codes: Mapping[str, CodedWeight], quantization: QuantizationConfig) -> dict[str, QuantizedTensor]:
    """A block's codes as a layer's parameters, by name without prefix; all parts of a linear layer have to be there."""
    return {
        name: tensor.pack(quantization.group_size, quantization.scale_dtype)
        for name, tensor in fuse_block(codes).items()
        if isinstance(tensor, CodedWeight)
    }


def global_parameters(
    arrays: Mapping[str, ArrayLike], quantization: QuantizationConfig, dtype: jax.typing.DTypeLike
) -> dict[str, Parameter]:
    """Embeddings in ``dtype``, the final norm in float32, the head in ``dtype`` or FP8."""
    parameters: dict[str, Parameter] = {}
    for name, array in arrays.items():
        if name == "lm_head" and quantization.lm_head_format == "fp8":
            parameters[name] = quantize(jnp.asarray(array).astype(jnp.float32), format="fp8")
        else:
            parameters[name] = jnp.asarray(array).astype(jnp.float32 if "norm" in name else dtype)
    return parameters


@functools.partial(jax.jit, static_argnums=1, compiler_options=COMPILE_QUICKLY)
def quantize_linear(weight: Float[Array, "*stack N K"], quantization: QuantizationConfig) -> QuantizedTensor:
    """Round an [N, K] matrix to the nearest codes as the config says (jitted: a weight's temporaries fuse away).

    A stack of matrices is rounded one by one.

    Raises:
        ValueError: if the config has no quantized weights, or measures their inputs first.
    """
    if quantization.weight_format == "none":
        raise ValueError("weight_format is 'none'; expected a format of 4 or 8 bits")
    if quantization.measures_inputs:
        raise ValueError("scale_search and error_compensation need the moments of the layer's inputs; calibrate")
    rounded = functools.partial(
        quantize,
        format=quantization.weight_format,
        group_size=quantization.group_size,
        scale_dtype=quantization.scale_dtype,
        channel_scale=quantization.channel_scale,
        rounding=quantization.rounding,
    )
    return over_stack(rounded)(weight)


def abstract(make: Callable[[], ModuleT]) -> ModuleT:
    """The module that ``make`` makes, with shapes for arrays, which say nothing of where they are.

    Under a mesh, ``nnx.eval_shape`` looks for one dtype in every parameter, which a quantized tensor does not have.
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(make)


def parameters_of(module: nnx.Module) -> dict[str, Parameter]:
    """Full name -> parameter of a module (its shapes only, if the module is abstract)."""
    return {
        ".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def with_parameters(module: ModuleT, parameters: Mapping[str, Parameter]) -> ModuleT:
    """The (abstract) module with these parameters in place of its own.

    Raises:
        ValueError: naming the first parameter that is missing, unknown, or of another shape or
            dtype than the module's.
    """
    expected = parameters_of(module)
    if missing := sorted(set(expected) - set(parameters)):
        raise ValueError(f"parameter {missing[0]} is missing (and {len(missing) - 1} more)")
    if unknown := sorted(set(parameters) - set(expected)):
        raise ValueError(f"parameter {unknown[0]} is not part of the model (and {len(unknown) - 1} more)")
    for name, value in parameters.items():
        if (found := describe(value)) != (wanted := describe(expected[name])):
            raise ValueError(f"parameter {name} is {found}; expected {wanted}")
    graph, state = nnx.split(module)
    filled = [(path, leaf.replace(parameters[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def describe(parameter: Parameter) -> str:
    """Shapes and dtypes of a parameter, for comparing and for messages."""
    leaves, structure = jax.tree.flatten(parameter)
    kind = "" if isinstance(parameter, jax.Array | jax.ShapeDtypeStruct) else f"{structure} of "
    return kind + ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
