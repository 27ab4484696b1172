"""A program for two processes: tensor and pipeline parallelism compute, generate and save what one process does.

    torchrun --nproc_per_node=2 tests/model/ranks_infer.py FOLDER

Both processes make all comparisons.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AutoModelForCausalLM, DistributedConfig

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.model.cache import WindowedCache

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "alibi_max_bias": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm of embeddings, untied": {"embedding_norm": True, "tie_word_embeddings": False, "norm_type": "layernorm"},
    "12 heads, trained slopes": {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "alibi_slopes_trainable": True,
        "attention_bias": True,
        "mlp_gated": True,
    },
    "gains of channels": {"qk_norm_gain": "channel"},
    "dynamic slopes": {"alibi_scaling": {"type": "dynamic"}, "training_length": 16},
}
INPUT_IDS = torch.arange(3, 403)[None] % 97


def loaded(folder: Path, **sizes: Any) -> Any:
    config = DistributedConfig(**sizes) if sizes else None
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def compare(model: Any, one: Any, folder: Path) -> None:
    """Compares logits, and generation with padding, several documents and a static cache; saves and loads."""
    right = one(INPUT_IDS).logits
    torch.testing.assert_close(model(INPUT_IDS).logits, right, rtol=0, atol=2e-6 * right.abs().max().item())
    padded = torch.ones(2, 60, dtype=torch.long)
    padded[0, :20] = 0
    documents = torch.tensor([[1] * 25 + [2] * 35] * 2)
    for inputs in (
        {"input_ids": INPUT_IDS, "max_new_tokens": 40},
        {"input_ids": INPUT_IDS[:, :60].repeat(2, 1), "attention_mask": padded, "max_new_tokens": 5},
        {"input_ids": INPUT_IDS[:, :60].repeat(2, 1), "attention_mask": documents, "max_new_tokens": 5},
        {"input_ids": INPUT_IDS[:, :60], "max_new_tokens": 5, "num_beams": 2},
        {
            "input_ids": INPUT_IDS[:, :60],
            "max_new_tokens": 5,
            "cache_implementation": "static",
            "disable_compile": True,
        },
    ):
        found, expected = (which.generate(**inputs, do_sample=False) for which in (model, one))
        assert torch.equal(found, expected), list(inputs)
    model.save_pretrained(folder)
    dist.barrier()
    torch.testing.assert_close(loaded(folder)(INPUT_IDS).logits, right, rtol=0, atol=0)


def check_windows(model: Any, one: Any) -> None:
    """Each rank's cache has the windows of its heads, forgets keys, and changes nothing. A mask may differ by head."""
    caches = [which.model.windowed_cache() for which in (model, one)]
    if one.config.slopes_depend_on_length:
        assert caches == [None, None]
        return
    heads = one.config.num_attention_heads // 2
    mine = slice(dist.get_rank() * heads, (dist.get_rank() + 1) * heads)
    assert all(isinstance(cache, WindowedCache) for cache in caches)
    assert [layer.windows for layer in caches[0].layers] == [layer.windows[mine] for layer in caches[1].layers]
    parts = INPUT_IDS.split([300, 1, 1, 98], 1)
    logits = torch.cat([model(part, past_key_values=caches[0]).logits for part in parts], 1)
    assert caches[0].layers[0].buffers[0].lost > 0
    right = one(INPUT_IDS).logits
    torch.testing.assert_close(logits, right, rtol=0, atol=5e-6 * right.abs().max().item())
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(1, 2 * heads, 400, 400, generator=generator).masked_fill(
        torch.ones(400, 400).triu(1) > 0, -1e30
    )
    found, right = (which(INPUT_IDS, attention_mask=mask).logits for which in (model, one))
    torch.testing.assert_close(found, right, rtol=0, atol=5e-6 * right.abs().max().item())


@torch.no_grad()
def main() -> None:
    """Runs all comparisons."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    folder = Path(sys.argv[1])
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        one = AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE | {"initializer_range": 0.2} | fields)).eval()
        for layer in one.model.layers:
            # A new model has the same gain in every head.
            layer.self_attn.q_norm.weight.uniform_(0.5, 2)
        if dist.get_rank() == 0:
            one.save_pretrained(folder / name)
        dist.barrier()
        stages = loaded(folder / name, pp_size=2)
        compare(stages, one, folder / f"{name} from stages")
        assert stages.model.windowed_cache() is None
        shares = loaded(folder / name, tp_size=2)
        check_windows(shares, one)
        compare(shares, one, folder / f"{name} from shares")
        if name == "12 heads, trained slopes":
            # The slopes stay in float32, and are the parameter from which Transformers takes the dtype to send.
            low, part = one.bfloat16(), loaded(folder / name, pp_size=2).bfloat16()
            assert torch.equal(part(INPUT_IDS).logits.bfloat16(), low(INPUT_IDS).logits)

    for fields in ({"num_attention_heads": 3}, {"num_key_value_heads": 1}, {"num_hidden_layers": 1}):
        odd = AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE | fields))
        path = folder / f"odd {fields}"
        if dist.get_rank() == 0:
            odd.save_pretrained(path)
        dist.barrier()
        if "num_hidden_layers" in fields:
            with pytest.raises(ValueError, match="1 layers cannot be divided into 2 stages"):
                loaded(path, pp_size=2)
        else:
            heads, shared = odd.config.num_attention_heads, odd.config.num_key_value_heads
            with pytest.raises(ValueError, match=f"{heads} query heads and {shared} key-value heads .* among 2 ranks"):
                loaded(path, tp_size=2)

    one, mesh = loaded(folder / "plain"), init_device_mesh("cpu", (2,))
    for backend in ("sdpa", "eager"):
        one.set_attn_implementation(backend)
        divided = INPUT_IDS.clone()
        with (
            context_parallel(mesh, buffers=[divided], buffer_seq_dims=[1]),
            pytest.raises(ValueError, match="context_parallel has no attention with ALiBi"),
        ):
            one(divided)
        one(INPUT_IDS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
