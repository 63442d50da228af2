"""Products with matrices of integers compiled for a TPU that is not there."""

import functools
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from jaxinfer.sharding import device_format, make_mesh, named_sharding
from jaxinfer.weights.split import ProductAxes, split_product
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices
from pallas_kernels.quantized_matmul import grouped_matmul, int8_matmul, tpu_blocks
from pallas_kernels.quantized_matmul.tpu_blocks import Blocks

# Bits of values and, of groups: G, and whether there are minimums; of activations for the others.
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"activation_bits": 16},
    "int8-dynamic": {"activation_bits": 8},
    "int8-dynamic-64": {"activation_bits": 8, "activation_group": 64},
    "int4-symmetric": {"bits": 4, "group": 32},
    "int4-symmetric-128": {"bits": 4, "group": 128},
    "int4": {"bits": 4, "group": 32, "minimums": True},
    "q8_0": {"bits": 8, "group": 32},
}
# Inputs and outputs of Llama 3 8B's largest matrices.
MATRICES = {"gate_up": (4096, (2, 14336)), "down_proj": (14336, (4096,))}
# What one chip of eight has, heads side by side where they would be narrow.
PARTS = {
    "gate_up": (4096, (2, 1792)),
    "down_proj": (1792, (4096,)),
    "qkv": (4096, (1, 768)),
    "o_proj": (512, (4096,)),
    "lm_head": (4096, (16032,)),
}
ROWS = (8, 64, 512)


def kernel_name(name: str, rows: int, num_inputs: int, outputs: tuple[int, ...]) -> str:
    """Returns the name of the kernel of a format for a shape."""
    form = FORMATS[name]
    shape = f"{rows}x{num_inputs}x{outputs[-1]}"
    if "bits" in form:
        minimums = "_minimums" if "minimums" in form else ""
        dtype = "uint8" if form["bits"] == 4 else "int8"
        return f"grouped_matmul_{dtype}_{form['group']}{minimums}_{shape}"
    return f"int8_matmul_{form['activation_bits']}_{form.get('activation_group', 0)}_{shape}"


def operation(
    name: str, num_inputs: int, outputs: tuple[int, ...]
) -> tuple[Any, list[tuple[tuple[int, ...], Any]], Any]:
    """Returns what multiplies, its arrays' shapes and dtypes, and their axes by the matrix's."""
    form = FORMATS[name]
    if "bits" not in form:
        arrays: list[Any] = [((*outputs, num_inputs), jnp.int8), (outputs, jnp.float32)]
        return (
            functools.partial(int8_matmul, **form),
            arrays,
            lambda inputs, behind: [(*behind, inputs), behind],
        )
    is_packed, groups = form["bits"] == 4, (num_inputs // form["group"], *outputs)
    values = (num_inputs // (1 + is_packed), *outputs), jnp.uint8 if is_packed else jnp.int8
    arrays = [values, *[(groups, jnp.float16)] * (2 if form.get("minimums") else 1)]
    return (
        grouped_matmul,
        arrays,
        lambda inputs, behind: [(inputs, *behind)] * len(arrays),
    )


def placed(mesh: Any, arrays: Any, axes: Any) -> list[Any]:
    """Abstract arrays as they lie in memory, their last axis along the lanes.

    Left to the compiler, one of two axes lies the way that takes less padding.
    """
    where: list[Any] = [
        device_format(mesh, of)
        if len(of) != 2
        else Format(Layout((0, 1)), named_sharding(mesh, of))
        for of in axes
    ]
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=form)
        for (shape, dtype), form in zip(arrays, where, strict=True)
    ]


def compile_product(
    target: str, name: str, rows: int, num_inputs: int, outputs: tuple[int, ...]
) -> Any:
    """The compiled program of one product on one chip, weights as the engine lays them."""
    mesh = make_mesh(topology_devices(parse_target(target))[:1])
    multiply, arrays, axes_of = operation(name, num_inputs, outputs)
    axes = axes_of("embed", (None,) * len(outputs))
    given = placed(mesh, arrays, axes)
    x = jax.ShapeDtypeStruct((rows, num_inputs), jnp.bfloat16, sharding=named_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(multiply).trace(x, *given).lower().compile()


def compile_feed_forward(target: str, name: str, rows: int) -> tuple[Any, int]:
    """gate_up and down_proj of a layer divided over all chips, and the bytes of all arrays."""
    mesh = make_mesh(topology_devices(parse_target(target)))
    (embed, up_outputs), (ffn, down_outputs) = MATRICES["gate_up"], MATRICES["down_proj"]
    up, up_arrays, up_axes = operation(name, embed, up_outputs)
    down, down_arrays, down_axes = operation(name, ffn, down_outputs)
    up_split, down_split = ("embed", (None, "ffn")), ("ffn", ("embed",))

    def feed_forward(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
        both = split_product(up, x, ups, up_axes(*up_split), ProductAxes(*up_split)).astype(x.dtype)
        hidden = jax.nn.silu(both[:, 0]) * both[:, 1]
        return x + split_product(
            down, hidden, downs, down_axes(*down_split), ProductAxes(*down_split)
        ).astype(x.dtype)

    x = jax.ShapeDtypeStruct((rows, embed), jnp.bfloat16, sharding=named_sharding(mesh))
    ups = placed(mesh, up_arrays, up_axes(*up_split))
    downs = placed(mesh, down_arrays, down_axes(*down_split))
    jitted = jax.jit(feed_forward, out_shardings=named_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jitted.trace(x, ups, downs).lower().compile()
    return compiled, sum(math.prod(a.shape) * a.dtype.itemsize for a in (*ups, *downs))


def bytes_of_turn(name: str, num_inputs: int, blocks: Blocks) -> float:
    """Counts the bytes that a kernel reads for a turn of its loop over a block of weights."""
    form = FORMATS[name]
    numbers = 2 * (1 + ("minimums" in form)) / form["group"] if "bits" in form else 0
    chunks = tpu_blocks.chunks_at_once(num_inputs, blocks.chunk, blocks.outputs)
    return blocks.outputs * chunks * blocks.chunk * (form.get("bits", 8) / 8 + numbers)


def compile_all(target: str) -> None:
    """Compiles every product of the tables; prints, as JSON, the bytes of a turn by kernel.

    What the compiler writes down is told apart by the kernels' names.
    """
    made: list[Blocks] = []
    plan = tpu_blocks.plan

    def recorded(*args: Any, **options: Any) -> Blocks:
        made.append(plan(*args, **options))
        return made[-1]

    tpu_blocks.plan = recorded
    turns = {}
    for name in FORMATS:
        for shape in MATRICES.values():
            for rows in ROWS:
                compile_product(target, name, rows, *shape)
                turns[kernel_name(name, rows, *shape)] = bytes_of_turn(name, shape[0], made[-1])
    print(json.dumps(turns))


if __name__ == "__main__":
    compile_all(sys.argv[1])
