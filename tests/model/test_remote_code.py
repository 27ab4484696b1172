"""The code that is saved with a checkpoint: two files, complete, and importing only torch and transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from fresh import Request, link_packages, run_fresh
from many_files import write_many_files
from torch import Tensor
from transformers.dynamic_module_utils import get_imports

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.positions import RotaryGPTConfig, RotaryGPTForCausalLM

INPUT_IDS = [list(range(3, 43)), list(range(43, 83))]
# Longer than the length up to which windows are ignored.
LONG_INPUT_IDS = [[(7 * i * i + i) % 90 + 3 for i in range(1100)]]
HEADS = {
    "AutoModel": "last_hidden_state",
    "AutoModelForCausalLM": "logits",
    "AutoModelForSequenceClassification": "logits",
    "AutoModelForTokenClassification": "logits",
    "AutoModelForMultipleChoice": "logits",
    "AutoModelForQuestionAnswering": "start_logits",
}


def input_ids_of(auto_class: str) -> list:
    """Returns `INPUT_IDS`, as two choices where the class chooses."""
    return [INPUT_IDS] if auto_class == "AutoModelForMultipleChoice" else INPUT_IDS


def new_model(auto_class: str, **values: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "pad_token_id": 0}
    config = AlibiGPTConfig(initializer_range=0.2, **(shape | values))
    return getattr(transformers, auto_class).from_config(config).eval()


def new_windowed_model() -> AlibiGPTForCausalLM:
    """Returns a model whose windows change the output visibly: they may lose half of the attention."""
    return new_model("AutoModelForCausalLM", window_tolerance=0.5, head_dim=4)


def new_rotary_model() -> RotaryGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    return RotaryGPTForCausalLM(RotaryGPTConfig(initializer_range=0.2, **shape)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model for every Auto class, in a folder named after the class, and three others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for auto_class in HEADS:
        new_model(auto_class).save_pretrained(folder / auto_class)
    new_windowed_model().save_pretrained(folder / "windows")
    shutil.copytree(folder / "AutoModelForCausalLM", folder / "many files")
    write_many_files(folder / "many files")
    new_rotary_model().save_pretrained(folder / "rotary")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The outputs of the saved models in a new process without this package."""
    requests = {name: Request(str(folder / name), input_ids_of(name), auto_class=name) for name in HEADS}
    requests["AutoModelForCausalLM"].caches = ["dynamic", "static"]
    requests["windows"] = Request(str(folder / "windows"), LONG_INPUT_IDS)
    requests |= {name: Request(str(folder / name), INPUT_IDS) for name in ("many files", "rotary")}
    return run_fresh(requests, tmp_path_factory.mktemp("fresh"), {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


def close(actual: Tensor, expected: Tensor) -> bool:
    """Returns whether values are equal up to 1e-5 of the largest one."""
    return torch.allclose(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_auto_class_loads_without_the_package(found: dict[str, Tensor], auto_class: str) -> None:
    with torch.no_grad():
        expected = new_model(auto_class)(torch.tensor(input_ids_of(auto_class)))[HEADS[auto_class]]
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


@torch.no_grad()
def test_a_checkpoint_with_a_file_for_every_part_still_loads(found: dict[str, Tensor]) -> None:
    assert found["many files is remote"]
    assert torch.equal(found["many files logits"], found["AutoModelForCausalLM logits"])


@torch.no_grad()
def test_other_positions_load_without_the_package(found: dict[str, Tensor]) -> None:
    assert found["rotary is remote"]
    assert close(found["rotary logits"], new_rotary_model()(torch.tensor(INPUT_IDS)).logits)


def code(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


def test_two_files_travel(folder: Path) -> None:
    for name in HEADS:
        assert code(folder / name).keys() == {"configuration_alibi_gpt.py", "modeling_alibi_gpt.py"}
        assert code(folder / name) == code(folder / "AutoModel")
    assert code(folder / "rotary") == code(folder / "AutoModel") | {
        "rotary.py": (folder / "rotary" / "rotary.py").read_bytes()
    }


def test_it_needs_nothing_but_torch_and_transformers(folder: Path) -> None:
    # Transformers requires huggingface_hub.
    allowed = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}
    for file in (*(folder / "AutoModel").glob("*.py"), folder / "rotary" / "rotary.py"):
        assert set(get_imports(file)) <= allowed, file
        assert "from . import" not in file.read_text(), f"{file}: the loader would leave that behind"


# Saves what it loads, three times, without the package.
GENERATIONS = """
import sys
sys.modules["hf_alibi"] = None
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

trusted = {"trust_remote_code": True}
folder = Path(sys.argv[1])
for name in ("AutoModelForCausalLM", "rotary"):
    source = folder / name
    for generation in ("second", "third", "fourth"):
        model = AutoModelForCausalLM.from_pretrained(source, **trusted)
        source = folder / f"{name} {generation}"
        model.save_pretrained(source)
    model.config.save_pretrained(folder / f"{name} config")
    AutoConfig.from_pretrained(folder / f"{name} config", **trusted)
    AutoModelForCausalLM.from_config(model.config, **trusted).save_pretrained(folder / f"{name} new")
    # Neither the decoder nor this class was loaded by an Auto class.
    model.model.save_pretrained(folder / f"{name} decoder")
model_class = get_class_from_dynamic_module("modeling_alibi_gpt.AlibiGPTForCausalLM", folder / "AutoModelForCausalLM")
model_class.from_pretrained(folder / "AutoModelForCausalLM").save_pretrained(folder / "by class")
"""


@pytest.fixture(scope="module")
def generations(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, to which a process without this package has added what it saved."""
    scratch = tmp_path_factory.mktemp("generations")
    (scratch / "program.py").write_text(GENERATIONS)
    link_packages(["torch", "transformers"], scratch / "site-packages")
    variables = {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = str(scratch / "site-packages")
    command = [sys.executable, "-P", "-S", str(scratch / "program.py"), str(folder)]
    done = subprocess.run(command, env=os.environ | variables, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "rotary"])
def test_code_survives_saving_without_the_package(generations: Path, name: str) -> None:
    first = generations / name
    auto_map = json.loads((first / "config.json").read_text())["auto_map"]
    for other in ("second", "third", "fourth", "new"):
        later = generations / f"{name} {other}"
        assert code(later) == code(first), other
        assert json.loads((later / "config.json").read_text())["auto_map"] == auto_map, other
    weights = (first / "model.safetensors").read_bytes()
    assert (generations / f"{name} fourth" / "model.safetensors").read_bytes() == weights


def test_what_no_auto_class_loaded_is_saved_with_its_code(generations: Path) -> None:
    assert code(generations / "by class") == code(generations / "AutoModel")
    assert code(generations / "AutoModelForCausalLM decoder") == code(generations / "AutoModel")
    assert code(generations / "rotary decoder") == code(generations / "rotary")
    auto_map = json.loads((generations / "rotary decoder" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "rotary.RotaryGPTModel"


def test_a_config_is_saved_with_the_code_at_hand(generations: Path, tmp_path: Path) -> None:
    own = {"configuration_alibi_gpt.py": (generations / "AutoModel" / "configuration_alibi_gpt.py").read_bytes()}
    AlibiGPTConfig.from_pretrained(generations / "AutoModel").save_pretrained(tmp_path / "loaded")
    assert code(tmp_path / "loaded") == code(generations / "AutoModel")
    assert code(generations / "rotary config") == code(generations / "rotary")
    # Without the package, Transformers keeps the file of the config apart.
    assert code(generations / "AutoModelForCausalLM config") == own
    # This one names no model.
    AlibiGPTConfig(hidden_size=96, num_attention_heads=6).save_pretrained(tmp_path)
    assert code(tmp_path) == own
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_alibi_gpt.AlibiGPTConfig"}


def test_other_processes_of_a_parallel_run_save_no_code(tmp_path: Path) -> None:
    new_model("AutoModelForCausalLM").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))
