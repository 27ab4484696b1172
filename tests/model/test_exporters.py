"""Transformers' exporters for generation: a program for prompts and one for steps, with a cache between them."""

from typing import Any

import pytest
import torch
from conftest import ModelFactory
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model.cache_names import CACHE_NAME

exporters = pytest.importorskip("transformers.exporters", reason="this version of Transformers has no exporters")
if not hasattr(exporters, "ModelRunner"):
    pytest.skip("the exporters of this version of Transformers do not run programs", allow_module_level=True)

pytestmark = [
    # Dynamo fails if a warning is an error.
    pytest.mark.filterwarnings("default"),
    # The exporters of Transformers and PyTorch's own translation use deprecated names.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# The windowed cache, which is the default, cannot be exported.
GENERATION = GenerationConfig(cache_implementation="dynamic", pad_token_id=0)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def mask_of(batch: int, length: int, padding: int) -> Tensor:
    """The first sequence has padding on the left."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


def exported(exporter: Any, config: Any, model: AlibiGPTForCausalLM) -> Any:
    inputs = {"input_ids": tokens(2, 9), "attention_mask": mask_of(2, 9, 3)}
    return exporter.export_for_generation(model, inputs, config, generation_config=GENERATION)


@torch.no_grad()
def check(program: Any, model: AlibiGPTForCausalLM, batch: int, length: int, padding: int) -> None:
    """Compares the logits of a prompt and of four steps with those of the model without a cache."""
    text, mask = tokens(batch, length), mask_of(batch, length, padding)
    new, runner, cache = text, program.runners["prefill"], DynamicCache(config=model.config)
    for step in range(5):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        outputs = runner(input_ids=new, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
        expected = model(text, attention_mask=mask, use_cache=False).logits[:, -new.shape[1] :]
        shown = mask[:, -new.shape[1] :].bool()
        scale = expected.abs().max().item()
        torch.testing.assert_close(outputs.logits[shown], expected[shown], rtol=0, atol=1e-5 * scale)
        new, runner, cache = tokens(batch, 50 + step)[:, :1], program.runners["decode"], outputs[CACHE_NAME]
        text, mask = torch.cat([text, new], 1), torch.cat([mask, torch.ones_like(new)], 1)


def test_prompts_and_steps_of_any_size(make_model: ModelFactory) -> None:
    model = make_model(num_key_value_heads=2, hidden_size=48)
    program = exported(exporters.DynamoExporter(), exporters.DynamoConfig(dynamic=True), model)
    for size in ((2, 9, 3), (4, 60, 20), (3, 5, 0)):
        check(program, model, *size)
    # ONNX Runtime cannot choose between booleans.
    for component in program.components.values():
        for node in component.program.graph.nodes:
            if node.target is torch.ops.aten.where.self:
                assert node.args[1].meta["val"].dtype != torch.bool


@pytest.mark.slow
def test_onnxruntime_runs_prompts_and_steps_of_any_size(make_model: ModelFactory) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_model(num_key_value_heads=2, hidden_size=48)
    program = exported(exporters.OnnxExporter(), exporters.OnnxConfig(dynamic=True), model)
    for size in ((2, 9, 3), (4, 300, 100), (1, 5, 0)):
        check(program, model, *size)


def test_the_default_cache_is_refused_by_name(make_model: ModelFactory) -> None:
    inputs = {"input_ids": tokens(2, 9), "attention_mask": mask_of(2, 9, 3)}
    with pytest.raises(RuntimeError, match="component 'prefill'") as error_info:
        exporters.DynamoExporter().export_for_generation(make_model(), inputs, exporters.DynamoConfig(dynamic=True))
    assert "cache_implementation='dynamic' in the generation config" in str(error_info.value.__cause__)
