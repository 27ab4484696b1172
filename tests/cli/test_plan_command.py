"""`hf_alibi plan` reads every kind of config and says what fits."""

import json
from pathlib import Path

import pytest
from conftest import ModelFactory

from hf_alibi import AlibiGPTConfig
from hf_alibi.cli.plan import main
from hf_alibi.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--per_device_train_batch_size", "2", "--block_size", "64"]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(list(argv))
    return capsys.readouterr().out


def cells(text: str, beginning: str) -> list[str]:
    """Returns the cells of the line that begins like this."""
    line = next(line for line in text.splitlines() if line.startswith(beginning))
    return line.removeprefix(beginning).split()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("wikitext103", "201.4M"), ("large", "1,258.4M")])
def test_the_papers_shapes(name: str, parameters: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, str(CONFIGS / f"{name}.toml"), "--bf16", "--per_device_train_batch_size", "2")
    assert f"{parameters} without embeddings" in text


def test_a_folder_a_file_and_a_study_are_read_alike(
    tmp_path: Path, make_model: ModelFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    AlibiGPTConfig(**shape, training_length=64).save_pretrained(tmp_path)
    model = "\n".join(f"{key} = {value}" for key, value in shape.items())
    study = "[training]\ntokens = 640\ntokens_per_step = 64\nlengths = [64]\nseeds = [0]\nevaluation_tokens = 64\n"
    study += "[test]\nlengths = [64]\ntokens = 128\nstride = 32\nsliding_targets = 64\n"
    (tmp_path / "study.toml").write_text(f"[model]\n{model}\n{study}")
    options = ["--per_device_train_batch_size", "2"]
    texts = {printed(capsys, str(tmp_path / name), *options) for name in ("", "config.json", "study.toml")}
    assert len(texts) == 1
    assert "2 x 64 tokens in a forward pass" in texts.pop()


def test_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AlibiGPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    text = printed(capsys, str(tmp_path), *SMALL, "--memory_gb", "0.0012")
    plain, again = (float(number) for number in cells(text, "most at a time"))
    assert again <= plain
    assert cells(text, "fits in 0.0") == ["no", "yes"]
    largest = [int(number) for number in cells(text, "largest batch")]
    assert largest[0] == 1
    assert largest[1] >= 2


def test_time_follows_from_operations_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AlibiGPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    options = [str(tmp_path), *SMALL, "--gpus", "4", "--peak_tflops", "1e-5", "--utilisation", "0.5"]
    options += ["--gradient_accumulation_steps", "3", "--tokens", "864000"]
    forward, both, seconds, speed, _, days = cells(printed(capsys, *options), "all keys")
    assert float(both) > 2 * float(forward)
    # 3 passes of 2 x 64 tokens at 5 million operations a second.
    assert float(seconds) == pytest.approx(3 * 128 * float(both) * 1e9 / 5e6, rel=0.3)
    tokens = float(speed.replace(",", ""))
    assert tokens == pytest.approx(4 * 3 * 128 / float(seconds.replace(",", "")), rel=0.3)
    assert float(days) == pytest.approx(10 / tokens, rel=0.3)


def test_overrides_change_sizes_that_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AlibiGPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    text = printed(capsys, str(tmp_path), *SMALL, "--config_overrides", "hidden_size=64,num_attention_heads=8")
    wide = AlibiGPTConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=8)
    wide.save_pretrained(tmp_path / "wide")
    assert text == printed(capsys, str(tmp_path / "wide"), *SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--gpu", "h1000"], "invalid choice: 'h1000'"),
        (["--optim", "lion"], "invalid choice: 'lion'"),
        (["--utilisation", "1.5"], "--utilisation must be above 0, at most 1, got 1.5"),
        (["--bf16", "--fp16"], "either --bf16 or --fp16"),
        (["--bf16", "--dtype", "bfloat16"], "keeps weights in float32, but --dtype is bfloat16"),
        (["--sharding_stage", "3"], "--sharding_stage 3 needs --gpus 2 or more"),
        (["--config_overrides", "hiden_size=3"], "no field 'hiden_size'"),
        (["--config_overrides", "hidden_size=33,num_attention_heads=2"], "33 does not divide into 2 heads"),
    ],
)
def test_mistakes_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    AlibiGPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        main([str(tmp_path), *options])


def test_other_models_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the config"):
        main([str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="is a 'gpt2' model; plan knows alibi_gpt"):
        main([str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "learned_gpt", "training_length": 32}))
    with pytest.raises(UserError, match="--block_size 64 exceeds the 32 positions"):
        main([str(tmp_path), "--block_size", "64"])
