"""Tapes hold every weight exactly once, and give it back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from plans import plans
from reference import tape_numpy
from tiny import random_params, tiny

from jax_mono import packing
from jax_mono.config import ConfigError, ModelConfig
from jax_mono.device_tapes import DeviceTapes
from jax_mono.granules import head_swizzle, layers_swizzle
from jax_mono.models.source import ArraySource, CheckpointError, Params, flatten, tensor_shapes, unflatten
from jax_mono.packing import pack
from jax_mono.plan import Plan, make_plan
from jax_mono.tape import Tapes, as_weights, storage
from jax_mono.unpacking import unpack_head, unpack_layer, unpack_vectors

SMOL = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8, "hidden_size": 72, "intermediate_size": 100}
"""SmolLM2's shape: three KV heads, and widths that fill no whole chunk of 32 columns."""

CASES = [
    ("llama", {"num_layers": 2}, 3, 5, jnp.float32),  # a device without KV heads
    ("llama", SMOL | {"num_layers": 2}, 2, 9, jnp.bfloat16),
    ("llama", SMOL | {"num_layers": 1}, 8, 1, jnp.float32),
    ("qwen2", {"num_layers": 2}, 3, 2, jnp.float32),  # biases of unequal length
    ("qwen2", {"num_layers": 2}, 3, 2, jnp.bfloat16),
    ("qwen3", {"num_layers": 2}, 4, 2, jnp.float32),
    ("laneformer", {"num_layers": 2}, 1, 3, jnp.float32),
    ("laneformer", {"num_layers": 1}, 4, 8, jnp.bfloat16),
    ("laneformer", {"num_layers": 1}, 8, 1, jnp.float32),
]
MATRICES = ("embed", "lm_head", "wq", "wk", "wv", "wo", "w1", "w3", "w2")


def numbered(config: ModelConfig) -> Params:
    """A model in which every weight of every matrix is another number, 0 being none of them."""
    tree, next_number = {}, 1
    for path, shape in tensor_shapes(config).items():
        if path.rsplit(".", 1)[-1] in MATRICES:
            size = int(np.prod(shape))
            tree[path] = np.arange(next_number, next_number + size, dtype=np.int64).reshape(shape)
            next_number += size
        else:
            tree[path] = np.ones(shape)
    return unflatten(tree)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_weight_is_on_the_tapes_exactly_once(plan: Plan) -> None:
    params = numbered(plan.config)
    packed = tape_numpy.pack(plan, params)
    table = params["embed"] if plan.config.tie_word_embeddings else params["lm_head"]
    for tapes, matrices in (
        (packed["layers"], [value for path, value in flatten(params["layers"]) if path.split(".")[-1] in MATRICES]),
        (packed["head"], [table]),
    ):
        on_tape = np.sort(tapes[tapes > 0])
        expected = np.sort(np.concatenate([matrix.ravel() for matrix in matrices]))
        np.testing.assert_array_equal(on_tape, expected)


def bits(array: Any) -> np.ndarray:
    """An array as unsigned integers, so that equal means equal bits, the sign of zero included."""
    array = np.asarray(array)
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


def any_bits(config: ModelConfig, dtype: DTypeLike) -> Params:
    """Matrices of arbitrary bit patterns, every kind of NaN included; vectors of finite numbers."""
    rng = np.random.default_rng(5)
    finite = dict(flatten(random_params(config, dtype=dtype)))

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.rsplit(".", 1)[-1] not in MATRICES:
            return np.asarray(finite[path])
        width = np.dtype(dtype).itemsize
        return rng.integers(0, 1 << 8 * width, shape, np.dtype(f"u{width}")).view(np.dtype(dtype))

    return unflatten({path: draw(path, shape) for path, shape in tensor_shapes(config).items()})


@pytest.mark.parametrize(("family", "overrides", "devices", "blocks", "dtype"), CASES)
def test_packing_follows_the_format_and_unpacking_returns_every_bit(
    family: str, overrides: dict[str, Any], devices: int, blocks: int, dtype: DTypeLike
) -> None:
    config = tiny(family, **overrides)
    plan, params = make_plan(config, devices=devices, blocks=blocks), any_bits(config, dtype)
    tapes = pack(plan, ArraySource(config, params), dtype=dtype)
    assert tapes.dtype == dtype and tapes.layers.dtype == storage(dtype)
    for name, expected in tape_numpy.pack(plan, params).items():
        np.testing.assert_array_equal(bits(getattr(tapes, name)), bits(expected), err_msg=name)
    assert_unpacks_to(plan, tapes, params)


@pytest.mark.parametrize(("family", "overrides", "devices", "blocks", "dtype"), CASES)
@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_devices_pack_what_the_host_packs(
    family: str,
    overrides: dict[str, Any],
    devices: int,
    blocks: int,
    dtype: DTypeLike,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they do where they are GPUs."""
    config = tiny(family, **overrides)
    plan, source = make_plan(config, devices=devices, blocks=blocks), ArraySource(config, any_bits(config, dtype))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",)) if form == "mesh" else None
    expected = pack(plan, source, dtype=dtype, mesh=mesh)
    monkeypatch.setattr(packing, "_HostTapes", DeviceTapes)
    tapes = pack(plan, source, dtype=dtype, mesh=mesh)
    for name in ("layers", "head", "constants", "embed"):
        found, wanted = getattr(tapes, name), getattr(expected, name)
        assert found.sharding == wanted.sharding
        np.testing.assert_array_equal(bits(found), bits(wanted), err_msg=name)


def assert_unpacks_to(plan: Plan, tapes: Tapes, params: Params) -> None:
    """Puts the devices' unpacked shares together and compares them with the model."""
    config = plan.config
    table = np.asarray(params["embed"] if config.tie_word_embeddings else params["lm_head"])
    for device, share in enumerate(plan.devices):
        constants = tapes.constants[device]
        for layer in range(config.num_layers):
            unpacked = unpack_layer(plan, share, tapes.layers[device], layer, layers_swizzle(plan, constants))
            expected = dict(own_matrices(plan, device, params["layers"][layer]))
            assert {path for path, _ in flatten(unpacked)} == set(expected)
            for path, matrix in flatten(unpacked):
                np.testing.assert_array_equal(bits(matrix), bits(expected[path]), err_msg=f"{device} {layer} {path}")
        head = unpack_head(plan, share, tapes.head[device], head_swizzle(plan, constants))
        np.testing.assert_array_equal(bits(head), bits(table[share.vocab.first : share.vocab.stop]))
        vectors = unpack_vectors(plan, constants, share)
        for name in ("attention_norm", "ffn_norm"):
            stacked = [np.asarray(params["layers"][layer][name], np.float32) for layer in range(config.num_layers)]
            np.testing.assert_array_equal(vectors.pop(name), stacked)
        np.testing.assert_array_equal(vectors.pop("norm"), np.asarray(params["norm"], np.float32))
        for name, vector in vectors.items():
            layers = [params["layers"][layer]["attention"][name] for layer in range(config.num_layers)]
            whole = np.asarray(np.stack([np.asarray(layer, np.float32) for layer in layers]))
            own = whole if name.endswith("norm") else own_bias(plan, device, name, whole)
            np.testing.assert_array_equal(vector, own, err_msg=name)


def own_matrices(plan: Plan, device: int, layer: Params) -> Iterator[tuple[str, np.ndarray]]:
    """What a device holds of a layer, cut by hand."""
    share = plan.devices[device]
    for path, matrix in flatten({name: layer[name] for name in ("attention", "feed_forward")}):
        name, matrix = path.rsplit(".", 1)[-1], np.asarray(matrix)
        if name not in MATRICES:
            continue
        if plan.config.lanes is not None:
            yield path, matrix[share.lanes.first : share.lanes.stop]
            continue
        own = own_channels(plan, device, name)
        yield path, matrix[:, :, own] if name in ("wo", "w2") else matrix[:, own]


def own_channels(plan: Plan, device: int, name: str) -> slice:
    share, size = plan.devices[device], plan.config.head_dim
    if name in ("w1", "w2", "w3"):
        return slice(share.neurons.first, share.neurons.stop)
    scale = size * (plan.config.queries_per_kv if name in ("wq", "wo", "bq") else 1)
    return slice(share.kv_heads.first * scale, share.kv_heads.stop * scale)


def own_bias(plan: Plan, device: int, name: str, whole: np.ndarray) -> np.ndarray:
    return whole[:, :, own_channels(plan, device, name)]


def test_stored_bits_mean_the_weights() -> None:
    weights = jnp.asarray([1.5, -0.0, 3e38], jnp.bfloat16)
    stored = as_weights(weights, storage(jnp.bfloat16))
    assert stored.dtype == jnp.uint16
    np.testing.assert_array_equal(as_weights(stored, jnp.bfloat16), weights)
    assert as_weights(stored, jnp.uint16) is stored


def test_a_mesh_gets_each_devices_tapes_on_its_device() -> None:
    config = tiny("laneformer", num_layers=2)
    plan, params = make_plan(config, devices=2, blocks=3), random_params(config)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[3:5])
    tapes = pack(plan, ArraySource(config, params), dtype=jnp.float32, mesh=mesh)
    for name, expected in tape_numpy.pack(plan, params).items():
        array = getattr(tapes, name)
        np.testing.assert_array_equal(array, expected, err_msg=name)
        assert array.sharding.is_equivalent_to(
            NamedSharding(mesh, P() if name == "embed" else P("devices")), array.ndim
        )
    assert tapes.nbytes == sum(np.asarray(array).nbytes for array in jax.tree.leaves(tapes))


def test_progress_names_every_tensor_once() -> None:
    config = tiny("qwen2", num_layers=1)
    seen: dict[str, int] = {}

    def on_tensor(path: str, nbytes: int) -> None:
        assert path not in seen
        seen[path] = nbytes

    pack(make_plan(config), ArraySource(config, random_params(config)), dtype=jnp.bfloat16, on_tensor=on_tensor)
    assert seen == {path: 2 * int(np.prod(shape)) for path, shape in tensor_shapes(config).items()}


def test_what_cannot_be_packed() -> None:
    config = tiny("llama", num_layers=1)
    source, plan = ArraySource(config, random_params(config)), make_plan(config, devices=2)
    with pytest.raises(ConfigError, match="the plan was made for another configuration"):
        pack(make_plan(config.replace(norm_eps=1e-6)), source)
    with pytest.raises(CheckpointError, match="weights cannot be read as int8; ask for float32, bfloat16 or float16"):
        pack(plan, source, dtype=jnp.int8)
    with pytest.raises(ConfigError, match="weights cannot be int8, only float32, bfloat16, float16"):
        storage(jnp.int8)
    for shape, axes in (((4,), ("devices",)), ((2,), ("model",)), ((2, 1), ("devices", "other"))):
        with pytest.raises(ConfigError, match="the plan needs one axis 'devices' of 2 devices"):
            pack(plan, source, mesh=jax.make_mesh(shape, axes))
