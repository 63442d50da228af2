"""The ``quantization_config`` of a config.json: which library packed the weights, and how.

What is in tensors is known by their names; here is what cannot be seen in them, and what would make
another computation of it is refused by name and value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxinfer.models.fields import MAX_SIZE, Fields

Layout = Literal["awq", "gptq", "packed", "int8"]
_WHERE = "quantization_config"


@dataclass(frozen=True)
class Packing:
    """The way integers lie in a folder's tensors; see packed_files for the ``layout``.

    ``group``: inputs that share a scale, None for all of an output. ``is_symmetric``: zero points,
    where there are any, are all in the middle. ``zero_offset``: what is added to stored ones.
    """

    layout: Layout
    bits: int
    group: int | None
    is_symmetric: bool
    zero_offset: int = 0


def read_packing(config: Mapping[str, Any]) -> Packing | None:
    """Reads what a config.json says of packed weights, None where it has nothing of the kind.

    Raises ``ValueError`` in one line for what is not supported, or is of a wrong type.
    """
    fields = config.get(_WHERE)
    text_config = config.get("text_config")
    if fields is None and isinstance(text_config, Mapping):
        fields = text_config.get(_WHERE)
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise ValueError(f"{_WHERE} must be an object, got {fields!r:.40}")
    method = fields.get("quant_method")
    known = {"awq": _read_awq, "gptq": _read_gptq, "compressed-tensors": _read_compressed}
    if not isinstance(method, str) or method not in known:
        raise ValueError(
            f"weights quantized by {method!r:.40} are not supported, those by {', '.join(known)} "
            "are: give the model they were made of, or a GGUF file"
        )
    return known[method](Fields(fields, f"{_WHERE}."), fields)


def _read_awq(fields: Fields, given: Mapping[str, Any]) -> Packing:
    for name in ("version", "format"):  # its name in newer files
        if fields.has(name) and fields.text(name).lower() != "gemm":
            raise ValueError(f"{_WHERE}.{name} is {given[name]!r:.80}; only 'gemm' is supported")
    fields.expect("bits", 4)
    has_zeros = fields.boolean("zero_point", True)
    return Packing("awq", fields.integer("bits"), _group(fields), not has_zeros)


def _read_gptq(fields: Fields, given: Mapping[str, Any]) -> Packing:
    fields.expect("bits", 4, 8)
    for name in ("checkpoint_format", "format"):  # its name in newer files
        fields.expect(name, "gptq", "gptq_v2")
    fields.expect("is_marlin_format", False)
    fields.expect("pack_dtype", "int32")
    fields.expect("rotation")
    fields.boolean("desc_act", False)  # the tensors say so themselves
    dynamic = given.get("dynamic") or {}
    # Keys that begin with "-:" leave modules out, which is seen in their tensors.
    if not isinstance(dynamic, Mapping) or not all(key.startswith("-:") for key in dynamic):
        raise ValueError(f"{_WHERE}.dynamic is {dynamic!r:.80}, which is not supported")
    stored = fields.text("checkpoint_format", fields.text("format", "gptq"))
    fields.expect("format", stored)
    is_symmetric = fields.boolean("sym", True)
    offset = 1 if stored == "gptq" else 0
    return Packing("gptq", fields.integer("bits"), _group(fields), is_symmetric, offset)


def _read_compressed(fields: Fields, given: Mapping[str, Any]) -> Packing:
    fields.expect("kv_cache_scheme")
    if given.get("sparsity_config"):
        sparsity = fields.fields("sparsity_config")
        sparsity.expect("format", "dense")
        sparsity.text("format")
    if given.get("transform_config"):
        fields.expect("transform_config")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{_WHERE}.config_groups must be an object, got {groups!r:.80}")
    several = fields.fields("config_groups")
    found = {_read_group(several.fields(name), fields) for name in groups}
    if len(found) > 1:
        raise ValueError(
            f"{_WHERE}.config_groups are {len(found)} different ones; only one is supported"
        )
    return found.pop()


def _read_group(group: Fields, whole: Fields) -> Packing:
    formats = ("pack-quantized", "int-quantized", "naive-quantized")
    whole.expect("format", *formats)
    group.expect("format", *formats)
    group.expect("output_activations")
    if group.has("input_activations"):
        activations = group.fields("input_activations").with_defaults({"dynamic": False})
        # What is made for each row as it comes is no part of the checkpoint.
        activations.expect("dynamic", True)
        activations.expect("type", "int")
        activations.expect("num_bits", 8)
    weights = group.fields("weights")
    weights.expect("type", "int")
    weights.expect("strategy", "group", "channel")
    weights.expect("dynamic", False)
    is_packed = group.text("format", whole.text("format")) == "pack-quantized"
    weights.expect("num_bits", *((4, 8) if is_packed else (8,)))
    bits = weights.integer("num_bits")
    by_group = weights.text("strategy") == "group"
    size = _group(weights) if by_group else None
    layout: Layout = "packed" if is_packed else "int8"
    return Packing(layout, bits, size, weights.boolean("symmetric", True))


def _group(fields: Fields) -> int | None:
    """``group_size``, in which -1 stands for all inputs."""
    size = fields.integer("group_size", low=-1)
    if size == 0:
        raise ValueError(f"{_WHERE}.group_size must be -1 or in [1, {MAX_SIZE}], got 0")
    return None if size == -1 else size
