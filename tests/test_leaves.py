import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.leaves import project, scattered


def test_project():
    x, leaf = jnp.arange(6.0).reshape(1, 2, 3), jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_allclose(project(x, leaf, axes=2), [[110, 125]])
    np.testing.assert_allclose(project(x, leaf[0]), [[[10, 13], [28, 40]]])
    assert project(x.astype(jnp.bfloat16), leaf[0]).dtype == jnp.bfloat16


def test_a_scattered_weight_is_the_weight_and_so_is_its_gradient():
    """Its gradient is made with the axis last that is split, and stands again where it stood."""
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 4, 3)))
    loss = lambda of, weight: jnp.sin(project(x, of(weight))).sum()
    plain = jax.value_and_grad(lambda w: loss(lambda w: w, w))(weight)
    turned = jax.value_and_grad(lambda w: loss(lambda w: scattered(w, jnp.float32), w))
    jax.tree.map(np.testing.assert_array_equal, turned(weight), plain)
    (barrier,) = [e for e in jax.make_jaxpr(turned)(weight).eqns if e.primitive.name == "optimization_barrier"]
    assert barrier.outvars[0].aval.shape == (12, 6)
