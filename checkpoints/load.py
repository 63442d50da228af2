"""From a file on disk to parameters on devices: find the format, assemble, cast, place.

Knows neither Flax nor any module: the abstract parameters say what is wanted, by path.
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.gguf_blocks import aligned_empty
from checkpoints.gguf_file import MAGIC
from jaxinfer.config import ModelConfig, TokenizerSpec
from jaxinfer.sharding import physical_model, physical_parameter

# Dequantization is bound by memory, and each thread holds a parameter: more bring nothing.
_NUM_THREADS = min(8, os.cpu_count() or 1)

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

ParameterPath = tuple[str | int, ...]


class Weights(Protocol):
    """A model and its tensors: float32, ``[out, in]``, by the names of GGUFCheckpoint.tensor."""

    @property
    def model(self) -> ModelConfig: ...

    def tensor(self, name: str) -> np.ndarray: ...


class Checkpoint(Weights, Protocol):
    """Weights with the tokenizer they were trained with."""

    @property
    def tokenizer(self) -> TokenizerSpec: ...


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a checkpoint, its format recognized by its first bytes.

    Raises ``ValueError`` in one line: no such file, not a file, unknown format, damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: a GGUF file is needed, this is {_kind_of(path)}")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        if start in (MAGIC, MAGIC[::-1]):
            return GGUFCheckpoint(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    raise ValueError(
        f"{path}: unknown checkpoint format, starts with {start!r}; supported is GGUF ({MAGIC!r})"
    )


def load_parameters(
    checkpoint: Weights,
    abstract: Mapping[Any, Any],
    progress: Callable[[int, int], None] | None = None,
    num_devices: int = 1,
) -> dict[Any, Any]:
    """Returns parameters in the structure, shapes, dtypes and shardings of ``abstract``.

    ``abstract`` is a nested dict (list indices are int keys) of ``jax.ShapeDtypeStruct``. With
    R = H // G, its paths are ``lm_head [E, V]``, ``embed_tokens [V, E]`` unless tied to the head,
    ``norm [E]``, and in ``layers``, i: ``input_norm [E]``, ``qkv [E, G, R + 2, D]`` (of each kv
    head its R query heads, its key head, its value head), ``o_proj [G, R, D, E]``,
    ``post_attention_norm [E]``, ``gate_up [E, 2, F]``, ``down_proj [F, E]``.

    ``num_devices`` is what ``abstract`` was made for: G, R, F and V are those of
    ``physical_model``, and heads are repeated and ends padded with zeros accordingly.
    ``progress(done, total)`` is called in this thread after each parameter. The host holds the
    parameters being made, one a thread, besides what the devices hold. Raises ``ValueError``
    naming the paths that are missing, unknown, of another shape, or not finite.
    """
    wanted = dict(_leaves(abstract, ()))
    _check_paths(wanted, physical_model(checkpoint.model, num_devices))
    shapes = parameter_shapes(checkpoint.model)

    def make(path: ParameterPath) -> jax.Array:
        array = _assemble(checkpoint, path, shapes[path], np.dtype(wanted[path].dtype))
        return _place(array, path, wanted[path], checkpoint.model, num_devices)

    loaded: dict[ParameterPath, jax.Array] = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # The largest first, so that no thread is left alone with it at the end.
        order = sorted(wanted, key=lambda path: -math.prod(wanted[path].shape))
        futures = {pool.submit(make, path): path for path in order}
        try:
            for future in as_completed(futures):
                loaded[futures[future]] = future.result()
                if progress:
                    progress(len(loaded), len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return _like(abstract, (), loaded)


def parameter_shapes(model: ModelConfig) -> dict[ParameterPath, tuple[int, ...]]:
    """Returns the shape of every parameter of a Llama, by path; axes as in load_parameters."""
    embed, ffn, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
    groups = model.num_key_value_heads
    queries = model.num_attention_heads // groups
    shapes: dict[ParameterPath, tuple[int, ...]] = {
        ("lm_head",): (embed, model.vocab_size),
        ("norm",): (embed,),
    }
    if not model.tie_word_embeddings:
        shapes["embed_tokens",] = (model.vocab_size, embed)
    for layer in range(model.num_hidden_layers):
        for name, shape in {
            "input_norm": (embed,),
            "qkv": (embed, groups, queries + 2, head_dim),
            "o_proj": (groups, queries, head_dim, embed),
            "post_attention_norm": (embed,),
            "gate_up": (embed, 2, ffn),
            "down_proj": (ffn, embed),
        }.items():
            shapes["layers", layer, name] = shape
    return shapes


def _kind_of(path: Path) -> str:
    return "a directory" if path.is_dir() else "a device or a pipe"


def _leaves(tree: Any, path: ParameterPath):
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _like(tree: Any, path: ParameterPath, leaves: Mapping[ParameterPath, Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _like(value, (*path, key), leaves) for key, value in tree.items()}
    return leaves[path]


def _check_paths(wanted: Mapping[ParameterPath, Any], model: ModelConfig) -> None:
    expected = parameter_shapes(model)
    for path in wanted:
        if path not in expected:
            raise ValueError(f"the checkpoint has nothing for parameter {path}")
    for path, shape in expected.items():
        if path not in wanted:
            raise ValueError(f"the model lacks parameter {path}, which the checkpoint has")
        if tuple(wanted[path].shape) != shape:
            raise ValueError(
                f"parameter {path} has shape {tuple(wanted[path].shape)}, "
                f"the checkpoint gives {shape}"
            )
        if wanted[path].dtype not in _DTYPES:
            names = ", ".join(np.dtype(dtype).name for dtype in _DTYPES)
            raise ValueError(
                f"parameter {path} has dtype {wanted[path].dtype}; supported are {names}"
            )


def _place(
    array: np.ndarray,
    path: ParameterPath,
    wanted: jax.ShapeDtypeStruct,
    model: ModelConfig,
    num_devices: int,
) -> jax.Array:
    if not np.isfinite(array).all():
        raise ValueError(f"parameter {path} has values that are not finite: a damaged checkpoint?")
    physical = physical_model(model, num_devices)
    array = physical_parameter(str(path[-1]), array, model, physical)
    # May alias: nothing else refers to the array, and on a CPU it need not be copied again.
    return jax.device_put(array, wanted.sharding, may_alias=True)


def _assemble(
    checkpoint: Weights, path: ParameterPath, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    name = ".".join(str(key) for key in path)
    *_, part = path
    layer = name.removesuffix(str(part))
    if part == "qkv":
        return _assemble_qkv(checkpoint, layer, shape, dtype)
    if part == "gate_up":
        out = aligned_empty(shape, dtype)
        out[:, 0] = checkpoint.tensor(layer + "gate").T
        out[:, 1] = checkpoint.tensor(layer + "up").T
        return out
    if part == "lm_head":
        tied = checkpoint.model.tie_word_embeddings
        array = checkpoint.tensor("embed_tokens" if tied else name).T
    elif part in ("o_proj", "down_proj"):
        array = checkpoint.tensor(name.removesuffix("_proj")).T
    else:
        array = checkpoint.tensor(name)
    return np.ascontiguousarray(array, dtype).reshape(shape)


def _assemble_qkv(
    checkpoint: Weights, layer: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    embed, groups, heads, head_dim = shape
    out = aligned_empty(shape, dtype)
    query = checkpoint.tensor(layer + "q").T
    out[:, :, : heads - 2] = query.reshape(embed, groups, heads - 2, head_dim)
    out[:, :, heads - 2] = checkpoint.tensor(layer + "k").T.reshape(embed, groups, head_dim)
    out[:, :, heads - 1] = checkpoint.tensor(layer + "v").T.reshape(embed, groups, head_dim)
    return out
