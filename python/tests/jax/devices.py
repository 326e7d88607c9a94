"""Eight devices of JAX on the processor, for the tests. Import it before `jax`."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy
from jax.sharding import NamedSharding, PartitionSpec

assert len(jax.devices()) == 8, "JAX was started before it was told of eight devices: run tests/jax by themselves"


def mesh(*sizes, first=0):
    """A mesh of as many devices as that takes, from the device `first` on, with axes x, y and z."""
    count = int(numpy.prod(sizes))
    devices = numpy.array(jax.devices()[first : first + count]).reshape(sizes)
    return jax.sharding.Mesh(devices, ("x", "y", "z")[: len(sizes)])


def over(sizes, *spec, first=0):
    """The sharding of dimensions over axes of such a mesh."""
    return NamedSharding(mesh(*sizes, first=first), PartitionSpec(*spec))


def numbers(*shape, dtype="float32"):
    """Different numbers everywhere."""
    return (numpy.arange(int(numpy.prod(shape))) % 241).reshape(shape).astype(dtype)


def placed(array, sharding):
    """An array of JAX that owns its memory: what XLA may reuse when it is donated."""
    return jax.block_until_ready(jax.jit(lambda x: x.copy(), out_shardings=sharding)(array))


def same(one, other):
    """Whether two arrays are equal in dtype, shape and bits."""
    one, other = numpy.asarray(one), numpy.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
