"""The code that is saved with a checkpoint: flat, complete, and importing only torch and transformers."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from fresh import Request, run_fresh
from torch import Tensor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import hf_alibi
from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM

INPUT_IDS = [list(range(3, 43)), list(range(43, 83))]
# Longer than the length up to which windows are ignored.
LONG_INPUT_IDS = [[(7 * i * i + i) % 90 + 3 for i in range(1100)]]
HEADS = {
    "AutoModel": "last_hidden_state",
    "AutoModelForCausalLM": "logits",
    "AutoModelForSequenceClassification": "logits",
    "AutoModelForTokenClassification": "logits",
    "AutoModelForQuestionAnswering": "start_logits",
}


def new_model(auto_class: str, **values: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "pad_token_id": 0}
    config = AlibiGPTConfig(initializer_range=0.2, **(shape | values))
    return getattr(transformers, auto_class).from_config(config).eval()


def new_windowed_model() -> AlibiGPTForCausalLM:
    """Returns a model whose windows change the output visibly: they may lose half of the attention."""
    return new_model("AutoModelForCausalLM", window_tolerance=0.5, head_dim=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model for every Auto class, in a folder named after the class, and one with narrow windows."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for auto_class in HEADS:
        new_model(auto_class).save_pretrained(folder / auto_class)
    new_windowed_model().save_pretrained(folder / "windows")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The outputs of the saved models in a new process without this package."""
    requests = {name: Request(str(folder / name), INPUT_IDS, auto_class=name) for name in HEADS}
    requests["AutoModelForCausalLM"].caches = ["dynamic", "static"]
    requests["windows"] = Request(str(folder / "windows"), LONG_INPUT_IDS)
    return run_fresh(requests, tmp_path_factory.mktemp("fresh"), {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


def close(actual: Tensor, expected: Tensor) -> bool:
    """Returns whether values are equal up to 1e-5 of the largest one."""
    return torch.allclose(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_auto_class_loads_without_the_package(found: dict[str, Tensor], auto_class: str) -> None:
    with torch.no_grad():
        expected = new_model(auto_class)(torch.tensor(INPUT_IDS))[HEADS[auto_class]]
    assert found[f"{auto_class} is remote"]
    assert close(found[f"{auto_class} {HEADS[auto_class]}"], expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_without_the_package(found: dict[str, Tensor], cache: str) -> None:
    model, input_ids = new_model("AutoModelForCausalLM"), torch.tensor(INPUT_IDS)
    mask = torch.ones_like(input_ids)
    expected = model.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[f"AutoModelForCausalLM {cache}"], expected)


@torch.no_grad()
def test_windows_without_the_package(found: dict[str, Tensor]) -> None:
    model = new_windowed_model()
    expected = model(torch.tensor(LONG_INPUT_IDS)).logits
    model.config.window_tolerance = 0
    assert close(found["windows logits"], expected)
    assert not close(found["windows logits"], model(torch.tensor(LONG_INPUT_IDS)).logits)


def test_what_travels_is_what_the_model_imports(folder: Path) -> None:
    package = Path(hf_alibi.__file__).parent / "model"
    imported = get_relative_import_files(package / "modeling_alibi_gpt.py")
    expected = {"modeling_alibi_gpt.py"} | {Path(file).name for file in imported}
    for name in HEADS:
        saved = {file.name: file.read_bytes() for file in (folder / name).glob("*.py")}
        assert saved == {file: (package / file).read_bytes() for file in expected}


def test_it_needs_nothing_but_torch_and_transformers(folder: Path) -> None:
    # Transformers requires huggingface_hub.
    allowed = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}
    for file in (folder / "AutoModel").glob("*.py"):
        assert set(get_imports(file)) <= allowed, file
        assert "from . import" not in file.read_text(), f"{file}: the loader would leave that behind"
