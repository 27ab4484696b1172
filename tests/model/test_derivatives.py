"""Derivatives other than a single backward pass: `sdpa` computes them correctly or raises an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from hf_alibi import AlibiGPTForCausalLM

# In forward mode, PyTorch compiles some formulas with a tool that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

Function = Callable[[Tensor], Tensor]
X, V = torch.randn(2, 1, 9, 24, generator=torch.Generator().manual_seed(0))


def forward_mode(f: Function) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, V))).tangent


def loss(f: Function) -> Function:
    return lambda x: f(x).square().mean()


CASES: dict[str, Callable[[Function], Tensor]] = {
    "jvp": lambda f: jvp(f, (X,), (V,))[1],
    "jacfwd": lambda f: jacfwd(lambda x: f(x).sum())(X),
    "forward_ad": forward_mode,
    "grad": lambda f: grad(loss(f))(X),
    "vjp": lambda f: vjp(f, X)[1](torch.ones(1, 7, 97))[0],
    "jacrev": lambda f: jacrev(lambda x: f(x).sum((0, 1)))(X),
    "hessian": lambda f: hessian(loss(f))(X),
    "grad of grad": lambda f: grad(lambda x: grad(loss(f))(x).square().sum())(X),
    "vmap": lambda f: vmap(f)(torch.stack([X, V])),
    "gradients by sample": lambda f: vmap(grad(loss(f)))(torch.stack([X, V])),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 1},
    "frozen": {"frozen": True},
    "padded": {"padded": True},
}


def function(make_model: ModelFactory, frozen: bool = False, padded: bool = False, **shape: Any) -> Any:
    """A model of float32 embeddings, with `sdpa`, and one of float64 with `eager`, the reference."""
    options: dict[str, Any] = {"use_cache": False}
    if padded:
        options["attention_mask"] = (torch.arange(9) >= 2)[None].long()
    for implementation, dtype in (("sdpa", torch.float32), ("eager", torch.float64)):
        model = make_model(hidden_size=24, num_attention_heads=3, **shape).to(dtype).requires_grad_(not frozen)
        model.set_attn_implementation(implementation)
        yield lambda x, model=model, dtype=dtype: model(inputs_embeds=x.to(dtype), **options).logits[:, 2:].to(x.dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_transform(make_model: ModelFactory, case: Callable[[Function], Tensor], shape: dict[str, Any]) -> None:
    found, expected = (case(f).detach() for f in function(make_model, **shape))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.bias_log_slopes"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_with_respect_to_weights(make_model: ModelFactory, name: str, mode: str) -> None:
    """Of forward mode, a directional derivative; slopes that are trained among them."""
    results = []
    for implementation in ("sdpa", "eager"):
        model = make_model(hidden_size=24, num_attention_heads=3, alibi_slopes_trainable=True)
        model.set_attn_implementation(implementation)
        weight = dict(model.named_parameters())[name].detach()

        def f(weight: Tensor, model: AlibiGPTForCausalLM = model) -> Tensor:
            return functional_call(model, {name: weight}, kwargs={"inputs_embeds": X, "use_cache": False}).logits

        if mode == "reverse":
            results.append(grad(loss(f))(weight))
        else:
            results.append(jvp(f, (weight,), (torch.ones_like(weight),))[1])
    torch.testing.assert_close(*results, rtol=0, atol=2e-5 * results[1].abs().max().item())


def test_a_second_backward_pass_is_refused_with_the_remedy(make_model: ModelFactory) -> None:
    model = make_model(hidden_size=24, num_attention_heads=3)

    def second() -> Tensor:
        x = X.clone().requires_grad_()
        value = model(inputs_embeds=x, use_cache=False).logits.square().mean()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(NotImplementedError, match="set_attn_implementation"):
        second()
    model.set_attn_implementation("eager")
    assert second().abs().max() > 0
