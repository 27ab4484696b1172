"""The command `hf_alibi convert`: its files, and its memory."""

import subprocess
import sys
from pathlib import Path

import conversion_sources as sources
import pytest
import torch
from hub_server import IGNORE_UPLOAD_WARNING, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from tiny import VOCAB_SIZE, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, GenerationConfig

from hf_alibi.__main__ import main
from hf_alibi.conversion import convert
from hf_alibi.errors import UserError
from hf_alibi.hub.checkpoints import load_causal_lm

CARD = "---\nlicense: bigscience-bloom-rail-1.0\nlanguage: [en]\n---\n\n# A source\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Returns a small BLOOM with tokenizer, generation config and card."""
    folder = sources.bloom(tmp_path / "source", 6, vocab_size=VOCAB_SIZE, eos_token_id=1)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(GenerationConfig(max_new_tokens=5).to_json_string())
    (folder / "README.md").write_text(CARD)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def test_the_command_says_what_it_did(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "ours"
    main(["convert", str(source), str(target), "--dtype", "float32", "--max_shard_size", "50KB"])
    printed = capsys.readouterr().out
    assert "Converted from BLOOM" in printed
    assert "Compared in float32 with Transformers' BloomForCausalLM on" in printed
    assert "| from a cache |" in printed
    assert len(list(target.glob("*.safetensors"))) > 1
    model, tokenizer = load_causal_lm(target, device="cpu")
    assert model.dtype == torch.float32
    assert model.generation_config.max_new_tokens == 5
    assert tokenizer("the quick brown fox").input_ids == tiny_tokenizer()("the quick brown fox").input_ids
    card = ModelCard.load(target / "README.md")
    assert card.data.license == "bigscience-bloom-rail-1.0"
    for text in ("## Conversion", str(source), "its tokenizer"):
        assert text in card.text
    assert not (target / "modeling_evil.py").exists()
    assert (target / "modeling_alibi_gpt.py").exists()
    main(["convert", str(target), str(tmp_path / "back"), "--to", "bloom"])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")).__name__ == "BloomForCausalLM"
    AutoTokenizer.from_pretrained(tmp_path / "back")


def test_a_published_card_still_says_where_the_weights_come_from(source: Path, tmp_path: Path) -> None:
    from hf_alibi.hub.model_card import model_card

    target = tmp_path / "ours"
    main(["convert", str(source), str(target)])
    model, _ = load_causal_lm(target, device="cpu")
    assert "Converted from BLOOM" in model_card(model, "me/bloom", target).text


def test_defaults_of_generation_in_an_old_config_are_kept(tmp_path: Path) -> None:
    source = sources.refact(tmp_path / "source", 6, do_sample=True, temperature=0.3)
    main(["convert", str(source), str(tmp_path / "ours")])
    found = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (found.do_sample, found.temperature, found.eos_token_id) == (True, 0.3, 0)


@IGNORE_UPLOAD_WARNING
def test_a_source_on_the_hub_comes_without_its_code(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        server.connect(tmp_path / "home", monkeypatch)
        HfApi().create_repo("tester/source")
        HfApi().upload_folder(repo_id="tester/source", folder_path=source)
        convert("tester/source", tmp_path / "ours")
        assert not any("modeling_evil.py" in request for request in server.requests if request.startswith("GET"))
        with pytest.raises(UserError, match="there is no folder tester/absent, and from the Hub: there is no repo"):
            convert("tester/absent", tmp_path / "absent")
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"no folder runs/typo, .* the download of runs/typo broke off: .*refused"):
            convert("runs/typo", tmp_path / "absent")
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert card.data.base_model == "tester/source"


PROGRAM = """
import sys
from hf_alibi.conversion import convert

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

before = status("VmRSS")
convert(sys.argv[1], sys.argv[2], max_shard_size="500MB")
print(before, status("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 1536), (torch.bfloat16, 2048)], ids=["float32", "bfloat16"]
)
def test_memory_stays_below_a_copy_and_a_file(tmp_path: Path, dtype: torch.dtype, width: int) -> None:
    config = BloomConfig(vocab_size=1000, hidden_size=width, n_layer=20, n_head=16)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in BloomForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    source = sources.save(
        tmp_path / "source", config.to_diff_dict(), sources.random_weights(shapes, dtype, std=0.02), "500MB"
    )
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert len(sizes) > 3
    assert sum(sizes) > 1.9e9
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "ours")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=900)
    before, peak = map(int, done.stdout.split())
    print(f"copy {sum(sizes):,}, file {max(sizes):,}, before {before:,}, peak {peak:,} bytes")
    assert peak - before < 1.3 * sum(sizes) + max(sizes)
