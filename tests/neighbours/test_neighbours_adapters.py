"""PEFT: adapters, merged adapters, learned prefixes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe, tokens
from torch import nn

pytest.importorskip("peft")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_merge(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], kind: str) -> None:
    before, after = recipe("LoRA")
    adapted = cook(before.replace("r=8", f"r=8, use_dora={kind == 'DoRA'}"))["model"]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = adapted.eval()(tokens(2, 90)).logits
    assert difference(model_of(books)(tokens(2, 90)).logits, expected) > 0.05
    cook(after, model=adapted)
    error = difference(model_of("runs/books-merged")(tokens(2, 90)).logits, expected)
    assert error < 2e-6
    shown("peft", f"{kind}: merged, saved and loaded, logits are the adapted model's to {error:.0e}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_learned_tokens_in_batches(books: str, shown: Callable[[str, str], None], kind: str) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(model_of(books), config).eval()
    text, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :20] = 0
    batched = model(text, attention_mask=mask).logits[0, -40:]
    single = model(text[:1, 20:]).logits[0, -40:]
    error = difference(batched, single)
    assert error < 1e-5
    shown("peft", f"{kind.removesuffix('Config')}: a padded batch equals single texts to {error:.0e}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_generating_after_learned_tokens(books: str, shown: Callable[[str, str], None], kind: str) -> None:
    """The prompts are longer than a chunk of a prompt that is read in chunks, and one is padded."""
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(model_of(books), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    text, mask = tokens(2, 2100), torch.ones(2, 2100, dtype=torch.long)
    mask[0, :300] = 0
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=text, attention_mask=mask, **how)
    for row, start in ((0, 300), (1, 0)):
        expected = text[row : row + 1, start:]
        for _ in range(12):
            following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], 1)
        assert torch.equal(found[row, start:], expected[0])
    shown(
        "peft", f"{kind.removesuffix('Config')}: generates 12 tokens after 2,100 as without a cache, in a padded batch"
    )
