"""`hf_alibi evaluate`: table, JSON and plot from real checkpoints. After a mistake, nothing is overwritten."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE, save_checkpoint

from hf_alibi.cli import evaluate as evaluate_command
from hf_alibi.errors import UserError
from hf_alibi.evaluation.perplexity import Result, encode_stream, mean_by_doubling, perplexity_by_length
from hf_alibi.evaluation.plots import Curve, plot_extrapolation
from hf_alibi.hub.checkpoints import load_causal_lm
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
pytestmark = pytest.mark.usefixtures("datasets_cache")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return evaluate_command.main


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def sinusoidal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SinusoidalGPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, training_length=16
    )
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sinusoidal", config)


@pytest.mark.parametrize("stride", [None, 4], ids=["no overlap", "stride 4"])
def test_table_json_and_plot(
    main: Callable[[list[str]], None],
    tiny_checkpoint: Path,
    sinusoidal: Path,
    text_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stride: int | None,
) -> None:
    prefix = tmp_path / "new folder" / "v1.2"
    arguments = ["--model_name_or_path", str(tiny_checkpoint), str(sinusoidal), "--validation_file", text_file]
    arguments += ["--lengths", "64", "16", "--max_tokens", "150", "--device", "cpu", "--output_prefix", str(prefix)]
    main(arguments + ([] if stride is None else ["--stride", str(stride)]))

    header, *rows, targets, caption = capsys.readouterr().out.splitlines()
    assert header.split() == ["length", "tiny", "sinusoidal"]
    assert targets.split() == ["tokens", "128", "128"]
    assert ("windows 4 tokens apart" if stride else "non-overlapping windows") in caption
    written = json.loads((tmp_path / "new folder" / "v1.2.json").read_text())["models"]
    for column, (folder, entry) in enumerate(zip([tiny_checkpoint, sinusoidal], written, strict=True)):
        model, tokenizer = load_causal_lm(folder, device="cpu")
        input_ids = encode_stream(tokenizer, [TEXT], 151)
        expected = perplexity_by_length(model, input_ids, [16, 64], stride, tokenizer=tokenizer)
        assert entry["label"] == folder.name
        assert entry["training_length"] == model.config.training_length
        for row, found, result in zip(rows, entry["results"], expected, strict=True):
            assert row.split()[0] == str(result.length)
            assert row.split()[1 + 2 * column] == f"{result.perplexity:.2f}"
            assert found["perplexity"] == pytest.approx(result.perplexity)
            assert found["bits_per_byte"] == pytest.approx(result.bits_per_byte)
            by_position = mean_by_doubling(result.nats_by_position)
            assert found["nats_by_position"] == pytest.approx({str(key): nats for key, nats in by_position.items()})
    picture = imread(tmp_path / "new folder" / "v1.2.png")
    # An empty plot would have fewer colours.
    assert len(set(map(tuple, picture.reshape(-1, 4).tolist()))) > 10


def test_the_standard_library_is_the_default_text(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model_name_or_path", str(tiny_checkpoint), "--lengths", "32", "--max_tokens", "64"])
    assert capsys.readouterr().out.splitlines()[-2].split() == ["tokens", "64"]


def test_files_can_be_streamed(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(json.dumps({"body": TEXT}) + "\n" for _ in range(3))
    (tmp_path / "rows.jsonl").write_text(rows)
    arguments = ["--model_name_or_path", str(tiny_checkpoint), "--lengths", "32", "--max_tokens", "64"]
    arguments += ["--validation_file", str(tmp_path / "rows.jsonl"), "--text_column", "body"]
    main(arguments)
    whole = capsys.readouterr().out
    main([*arguments, "--streaming"])
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validation_file", "missing.txt"], "no such file: missing.txt"),
        (["--labels", "one", "two"], "2 --labels for 1 checkpoints"),
        (["--dataset_name", "some/dataset"], "either --dataset_name or --validation_file"),
        (
            ["--lengths", "16", "100000", "--max_tokens", "200000"],
            "length 100000 needs at least 100001 tokens of text",
        ),
        (["--stride", "17"], "stride is 17 and length 16"),
        (["--device", "nonesuch"], "device 'nonesuch' is not available"),
        (["--device", "meta"], "device 'meta' holds no data"),
        (["--tokens_per_forward", "0"], "--tokens_per_forward must be at least 1, got 0"),
        (["--max_tokens", "-5"], "--max_tokens must be at least 1, got -5"),
        (["--max_tokens", "15"], "--max_tokens 15 is less than the longest of --lengths"),
        (["--lengths", "16", "0"], r"--lengths must be at least 1, got \[16, 0\]"),
        (["--stride", "0"], "--stride must be at least 1, got 0"),
        (["--output_prefix", "/proc/none/x"], "cannot write to --output_prefix"),
        (["--output_prefix", "{taken}"], "cannot write to --output_prefix .*Is a directory"),
        (["--output_prefix", ".."], "lacks the beginning of a file name"),
        (["--length", "16"], "unknown arguments: --length 16; did you mean --lengths?"),
        (["--config_overrides", "alibi_scaling=2"], "alibi_scaling"),
        (["--model_name_or_path", "{tiny}", "./missing"], r"\./missing .which is no folder here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_leaves_earlier_results_alone(
    main: Callable[[list[str]], None],
    tiny_checkpoint: Path,
    text_file: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    for name in ("earlier.json", "earlier.png"):
        (tmp_path / name).write_text("kept")
    common = ["--model_name_or_path", str(tiny_checkpoint), "--validation_file", text_file, "--lengths", "16"]
    (tmp_path / "taken.png").mkdir()
    arguments = [argument.format(tiny=tiny_checkpoint, taken=tmp_path / "taken") for argument in arguments]
    with pytest.raises(UserError, match=message):
        main([*common, "--output_prefix", str(tmp_path / "earlier"), *arguments])
    assert all((tmp_path / name).read_text() == "kept" for name in ("earlier.json", "earlier.png"))


def test_results_are_written_before_what_comes_after_can_fail(
    main: Callable[[list[str]], None],
    tiny_checkpoint: Path,
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First the second checkpoint is broken, then the plot fails."""
    broken = save_checkpoint(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    prefix = tmp_path / "results"
    common = ["--validation_file", text_file, "--lengths", "16", "--device", "cpu", "--output_prefix", str(prefix)]
    with pytest.raises(UserError, match="gives losses that are not finite"):
        main(["--model_name_or_path", str(tiny_checkpoint), str(broken), *common])
    written = json.loads(prefix.with_suffix(".json").read_text())
    assert [entry["label"] for entry in written["models"]] == ["tiny"]
    prefix.with_suffix(".json").unlink()

    def fail(*_: object) -> None:
        raise RuntimeError("no plot")

    monkeypatch.setattr(evaluate_command, "plot_extrapolation", fail)
    with pytest.raises(RuntimeError, match="no plot"):
        main(["--model_name_or_path", str(tiny_checkpoint), *common])
    assert json.loads(prefix.with_suffix(".json").read_text()) == written


@pytest.mark.parametrize("label", ["$x", "$\\frac$", "_hidden", "a%b{c}"])
def test_a_label_is_drawn_as_it_is(label: str, tmp_path: Path) -> None:
    result = Result(8, 8, 64, 1.0, None, 2.7, 1.1, (1.0,) * 8)
    pictures = []
    for name in (label, "x" + label[1:]):
        plot_extrapolation([Curve(name, 8, [result]), Curve("other", 8, [result])], tmp_path / "plot.png")
        pictures.append(imread(tmp_path / "plot.png"))
    assert pictures[0].shape == pictures[1].shape
    # The first character is drawn.
    assert (pictures[0] != pictures[1]).any()


def test_as_a_program_it_ends_in_one_line_and_status_2() -> None:
    command = [sys.executable, str(SCRIPT), "--model_name_or_path", "./missing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: cannot load the config of ./missing")
    assert "Traceback" not in done.stderr
