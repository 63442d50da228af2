"""The MLP of a layer: dense, or a mixture of experts.

Axis letters: T rows, E embed, F ffn, X experts, K experts a token takes, N devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer import weights
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.declaration import Declaration, Sources
from jaxinfer.models import layers
from jaxinfer.sharding import TENSOR, num_tensor_devices, partition_spec
from jaxinfer.weights import Matrix

Activation = Callable[[jax.Array], jax.Array]

# Of a product on CPU: few, for decode rows seldom share an expert.
_BLOCK_ROWS = 8


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020). ``model`` has physical shapes."""

    def __init__(
        self,
        model: ModelConfig,
        dtypes: DtypePolicy,
        rngs: nnx.Rngs,
        activation: Activation = jax.nn.silu,
    ) -> None:
        embed, ffn = model.hidden_size, model.intermediate_size
        self.activation = activation
        sources = Sources(("gate", "up"), "gate_and_up", (1, 1))
        axes = ("embed", "gate_and_up", "ffn")
        gate_up = Declaration((embed, 2, ffn), axes, (0,), sources)
        self.gate_up = weights.declare(rngs, dtypes, gate_up)
        down = Declaration((ffn, embed), ("ffn", "embed"), (0,), Sources(("down",)))
        self.down_proj = weights.declare(rngs, dtypes, down)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, E] -> [T, E]."""
        gate_up = layers.linear(x, self.gate_up)  # [T, 2, F]
        hidden = self.activation(gate_up[:, 0]) * gate_up[:, 1]
        return layers.linear(hidden, self.down_proj)


class MixtureOfExperts(nnx.Module):
    """Gated MLPs, of which a router picks K for each token (Shazeer et al. 2017).

    ``model`` has physical shapes: its experts may be more than the ``num_routed`` that the router
    knows, zeros that fill up the last device. Experts are split over the devices that split the
    heads; the sum over them is the layer's second exchange, as it is for a dense MLP.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtypes: DtypePolicy,
        rngs: nnx.Rngs,
        mesh: Mesh | None,
        num_routed: int,
    ) -> None:
        embed, ffn, experts = model.hidden_size, model.intermediate_size, model.num_experts
        self.model, self.mesh = model, mesh
        # Float32: which experts are next to each other may hang on the last bits.
        router = Declaration((embed, num_routed), ("embed", None), (0,))
        self.router = layers.parameter(rngs, router, "float32", fan_in=embed)
        # Each expert is whole on one device, so that only the first axis is divided.
        sources = Sources(("experts_gate", "experts_up"), "gate_and_up", (ffn, ffn))
        axes = ("experts", "embed", "gate_and_up")
        gate_up = Declaration((experts, embed, 2 * ffn), axes, (1,), sources)
        self.experts_gate_up = weights.declare(rngs, dtypes, gate_up)
        down = Declaration((experts, ffn, embed), ("experts", None, "embed"), (1,))
        self.experts_down = weights.declare(rngs, dtypes, down)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, E] -> [T, E]."""
        shares, experts = self._route(x)
        gate_up = weights.matrix(self.experts_gate_up)
        down = weights.matrix(self.experts_down)
        num_devices = num_tensor_devices(self.mesh)
        if self.mesh is None or num_devices == 1:
            return _mix(x, shares, experts, gate_up, down, 0).astype(x.dtype)
        num_local = self.model.num_experts // num_devices

        def mix(
            x: jax.Array, shares: jax.Array, experts: jax.Array, gate_up: Matrix, down: Matrix
        ) -> jax.Array:
            first = jax.lax.axis_index(TENSOR) * num_local
            return jax.lax.psum(_mix(x, shares, experts, gate_up, down, first), TENSOR)

        whole, split = PartitionSpec(), partition_spec(("experts",))
        mixed = jax.shard_map(
            mix,
            mesh=self.mesh,
            in_specs=(whole, whole, whole, split, split),
            out_specs=whole,
            check_vma=False,
        )(x, shares, experts, gate_up, down)
        return mixed.astype(x.dtype)

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[T, K] float32 shares and int32 experts of every row."""
        logits = layers.linear(x.astype(jnp.float32), self.router)
        shares, experts = jax.lax.top_k(
            jax.nn.softmax(logits, axis=-1), self.model.num_experts_per_tok
        )
        if self.model.norm_topk_prob:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        return shares, experts


def _mix(
    x: jax.Array,
    shares: jax.Array,
    experts: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    first: jax.Array | int,
) -> jax.Array:
    """[T, E] float32: what the experts ``first`` ... of this device add to every row.

    ``shares`` and ``experts`` [T, K], ``gate_up`` [X, E, 2 F], ``down`` [X, F, E]. Rows are put in
    the order of their experts, so that each expert is one product, of those rows that want it.
    """
    num_rows, num_chosen = experts.shape
    num_experts = jax.tree.leaves(gate_up)[0].shape[0]
    wanted = experts.reshape(-1) - first
    is_here = (wanted >= 0) & (wanted < num_experts)
    wanted = jnp.where(is_here, wanted, num_experts)  # those of other devices come last
    order = jnp.argsort(wanted, stable=True)
    sizes = jnp.bincount(wanted, length=num_experts).astype(jnp.int32)
    rows = x[order // num_chosen]
    hidden = grouped_product(rows, gate_up, sizes)
    gate, up = jnp.split(hidden, 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    outputs = grouped_product(hidden, down, sizes)
    # Rows of other devices belong to no group: what is there has no meaning.
    outputs = jnp.where(is_here[order][:, None], outputs, 0)
    back = jnp.argsort(order)
    outputs = outputs[back].reshape(num_rows, num_chosen, -1)
    # Added in the order of preference, the same for every batch; a scatter would not say.
    return jnp.sum(outputs * shares[:, :, None], axis=1)


def grouped_product(rows: jax.Array, matrices: Matrix, sizes: jax.Array) -> jax.Array:
    """``weights.grouped_product``, or what takes its place on CPU."""
    return jax.lax.platform_dependent(
        rows, matrices, sizes, cpu=_product_by_blocks, default=weights.grouped_product
    )


def _product_by_blocks(rows: jax.Array, matrices: Matrix, sizes: jax.Array) -> jax.Array:
    """For XLA:CPU, whose ragged_dot multiplies every row by every group's weights: with 64 groups
    this takes a 28th to a 40th of the time (docs/log.md).

    Blocks are as high for one row as for many, so that a row's bits do not hang on its group.
    """
    num_rows, block = rows.shape[0], _BLOCK_ROWS
    num_blocks = (sizes + block - 1) // block
    ends, first_rows = jnp.cumsum(num_blocks), jnp.cumsum(sizes) - sizes
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def multiply_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        group = jnp.searchsorted(ends, i, side="right")
        first = first_rows[group] + (i - (ends[group] - num_blocks[group])) * block
        one = jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(array, group, keepdims=False), matrices
        )
        return first, weights.product(jax.lax.dynamic_slice_in_dim(padded, first, block), one)

    def multiply(i: jax.Array, products: jax.Array) -> jax.Array:
        first, product = multiply_block(i)
        # Rows of the next group in it are written again by that group's own block, later.
        return jax.lax.dynamic_update_slice_in_dim(products, product, first, 0)

    num_outputs = jax.eval_shape(multiply_block, ends[-1])[1].shape[1]
    products = jnp.zeros((num_rows + block, num_outputs), jnp.float32)
    return jax.lax.fori_loop(0, ends[-1], multiply, products)[:num_rows]
