"""`hf_alibi generate` continues prompts exactly as `generate` does, with any argument of GenerationConfig."""

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, save_checkpoint
from transformers import GenerationConfig, GPT2Config, set_seed

from hf_alibi.cli.generate import main as generate_command
from hf_alibi.cli.generation_options import NOT_OPTIONS, add_generation_options
from hf_alibi.errors import UserError
from hf_alibi.hub.checkpoints import load_causal_lm

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
PROMPT = "the quick brown fox "


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return generate_command


def expected_text(checkpoint: Path, prompt: str, **options: Any) -> str:
    model, tokenizer = load_causal_lm(checkpoint, device="cpu")
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if "seed" in options:
        set_seed(options.pop("seed"))
    sequence = model.generate(  # type: ignore[operator]
        input_ids, attention_mask=torch.ones_like(input_ids), tokenizer=tokenizer, **options
    )[0]
    return str(tokenizer.decode(sequence[input_ids.shape[1] :], skip_special_tokens=True))


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "greedy": ([], {}),
    "sampling": (
        ["--do_sample", "--top_p", "0.9", "--temperature", "1.5", "--seed", "3"],
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "seed": 3},
    ),
    "boolean with a value": (["--do_sample", "false"], {"do_sample": False}),
    "static cache": (["--cache_implementation", "static"], {"cache_implementation": "static"}),
    "beams": (["--num_beams", "3"], {"num_beams": 3}),
    "integer": (["--no_repeat_ngram_size", "1"], {"no_repeat_ngram_size": 1}),
    "stop strings": (["--stop_strings", '["a", "e"]'], {"stop_strings": ["a", "e"]}),
    "one stop string": (["--stop_strings", "e"], {"stop_strings": "e"}),
    "a stop string that is a number": (["--stop_strings", "5"], {"stop_strings": "5"}),
    "dashes": (["--no-repeat-ngram-size", "1"], {"no_repeat_ngram_size": 1}),
    "no end of text": (["--eos_token_id", "null"], {"eos_token_id": None}),
    "biases": (["--sequence_bias", "[[[70], 9.5]]"], {"sequence_bias": [[[70], 9.5]]}),
    "JSON list": (["--suppress_tokens", "[5, 6, 7]"], {"suppress_tokens": [5, 6, 7]}),
}


@pytest.mark.parametrize(("arguments", "options"), CASES.values(), ids=CASES.keys())
def test_output_is_the_continuation_alone(
    main: Callable[[list[str]], None],
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    options: dict[str, Any],
) -> None:
    common = ["--model_name_or_path", str(tiny_checkpoint), "--device", "cpu", "--prompt", PROMPT]
    main([*common, "--max_new_tokens", "40", *arguments])
    output = capsys.readouterr().out
    assert output == expected_text(tiny_checkpoint, PROMPT, max_new_tokens=40, **options) + "\n"


def test_every_documented_argument_is_an_option() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_generation_options(parser)
    options = {action.dest for action in parser._actions}
    assert options <= vars(GenerationConfig()).keys()
    assert "penalty_alpha" not in options  # deprecated
    documented = {
        name for name in vars(GenerationConfig()) if re.search(rf"\n +{name}\b", str(GenerationConfig.__doc__))
    }
    assert options == documented - NOT_OPTIONS


def test_prompt_from_a_file_or_standard_input(
    main: Callable[[list[str]], None],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Far longer than the training length of 32 tokens.
    prompt = "the lazy dög\r\njumps\n\r\n" * 20
    expected = expected_text(tiny_checkpoint, prompt, max_new_tokens=10) + "\n"
    common = ["--model_name_or_path", str(tiny_checkpoint), "--device", "cpu", "--max_new_tokens", "10"]
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    main([*common, "--prompt_file", str(tmp_path / "prompt.txt")])
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode()), encoding="ascii"))
    main([*common, "--include_prompt"])
    assert capsys.readouterr().out == prompt + expected


def test_a_special_token_in_the_prompt_is_that_token(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "the lazy dog<|endoftext|>the fox"
    main(
        ["--model_name_or_path", str(tiny_checkpoint), "--device", "cpu", "--prompt", prompt, "--max_new_tokens", "5"]
    )
    assert capsys.readouterr().out == expected_text(tiny_checkpoint, prompt, max_new_tokens=5) + "\n"


def test_no_prompt_begins_with_the_first_token_of_a_text(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model_name_or_path", str(tiny_checkpoint), "--device", "cpu", "--max_new_tokens", "10"]
    main([*common, "--prompt", ""])
    assert capsys.readouterr().out == expected_text(tiny_checkpoint, "<|endoftext|>", max_new_tokens=10) + "\n"


def test_the_checkpoint_sets_what_options_do_not(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_causal_lm(tiny_checkpoint, device="cpu")
    model.generation_config.update(max_new_tokens=7, repetition_penalty=3.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    common = ["--model_name_or_path", str(tmp_path), "--device", "cpu", "--prompt", PROMPT]
    expected = {
        length: expected_text(tiny_checkpoint, PROMPT, max_new_tokens=length, repetition_penalty=3.0) + "\n"
        for length in (7, 9)
    }
    main(common)
    assert capsys.readouterr().out == expected[7]
    main([*common, "--max_new_tokens", "9"])
    assert capsys.readouterr().out == expected[9]


def test_several_sequences_are_printed_one_after_the_other(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model_name_or_path", str(tiny_checkpoint), "--device", "cpu", "--prompt", PROMPT]
    common += [
        "--suppress_tokens",
        str([token for token in range(VOCAB_SIZE) if not 66 <= token <= 91]),
    ]  # letters only
    main([*common, "--max_new_tokens", "5", "--do_sample", "--seed", "0", "--num_return_sequences", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_file", "missing.txt"], "cannot read the prompt from missing.txt"),
        (["--prompt_file", "."], "cannot read the prompt from .: .*directory"),
        (["--prompt", "n\udcc3"], "cannot read the prompt from --prompt: 'utf-8' codec"),
        (["--prompt", "x", "--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--prompt", "x", "--device", "meta"], "device 'meta' holds no data"),
        (["--prompt", "x", "--eos_token_id", "xx"], "--eos_token_id must be a token id or a list of them, got 'xx'"),
        (["--prompt", "x", "--eos_token_id", "[5, 290]"], "--eos_token_id: the model has 290 tokens, but no 290"),
        (["--prompt", "x", "--sequence_bias", "[[[-1], 2]]"], "--sequence_bias: the model has 290 tokens, but no -1"),
        (["--prompt", "x", "--sequence_bias", "[[5], 2]"], "--sequence_bias must be pairs of token ids and a bias"),
        (["--prompt", "x", "--stop_strings", "[5]"], "--stop_strings must be text"),
        (["--prompt", "x", "--num_beams", "-1"], "--num_beams must be from 1 to 2147483648, got -1"),
        (["--prompt", "x", "--num_return_sequences", "0"], "--num_return_sequences must be from 1"),
        (["--prompt", "x", "--length_penalty", "1e9"], "--length_penalty must be from -100 to 100"),
        (["--prompt", "x", "--max_time", "-1"], "--max_time must be from 0"),
        (["--prompt", "x", "--max_time", "inf"], "--max_time must be a finite number"),
        (["--prompt", "x", "--top_p", "3"], "--top_p must be from 0 to 1"),
        (["--prompt", "x", "--do_sample", "--temperature", "nan"], "--temperature must be a number, got nan"),
        (["--prompt", "x", "--exponential_decay_length_penalty", "5"], "must be a length and a factor"),
        (["--prompt", "x", "--watermarking_config", "5"], "--watermarking_config must be an object"),
        (["--prompt", "x", "--num_return_sequences", "2"], "Greedy methods"),
        (["--prompt", "x", "--max_new_tokens", "0"], "`max_new_tokens` must be greater than 0"),
        (["--prompt", "x", "--cache_implementation", "nonesuch"], "Invalid `cache_implementation`"),
        (["--prompt", "x y z", "--max_length", "2"], "`max_length` is set to 2"),
        (["--prompt", "x", "--model_name_or_path", "./missing"], "no folder here"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_mistakes_are_explained(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(["--model_name_or_path", str(tiny_checkpoint), "--device", "cpu", *arguments])


def test_a_prompt_that_is_no_text_is_refused(
    main: Callable[[list[str]], None], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("né".encode()[:-1]), encoding="utf-8"))
    with pytest.raises(UserError, match="cannot read the prompt from standard input: 'utf-8' codec"):
        main(["--model_name_or_path", str(tiny_checkpoint)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_k", "many"], "argument --top_k/--top-k: invalid int value: 'many'"),
        (["--do_sample", "perhaps"], "argument --do_sample/--do-sample: Truthy value expected"),
        (["--penalty_alpha", "0.6"], "unknown arguments: --penalty_alpha 0.6"),
        (["--max_new", "5"], "unknown arguments: --max_new 5; did you mean --max_new_tokens?"),
        (["--prompt"], "argument --prompt: expected one argument"),
    ],
    ids=["no number", "no boolean", "deprecated", "abbreviation", "no value"],
)
def test_arguments_are_checked_before_the_model_is_loaded(
    main: Callable[[list[str]], None], arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--model_name_or_path", "./missing", *arguments])


def test_position_embeddings_limit_the_continuation(
    main: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape: dict[str, Any] = {"n_positions": 20, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, **shape)
    save_checkpoint(tmp_path, config)
    common = ["--model_name_or_path", str(tmp_path), "--device", "cpu", "--prompt", "xyz"]
    main([*common, "--max_new_tokens", "17"])
    capsys.readouterr()
    with pytest.raises(UserError, match="gpt2 has 20 position embeddings, too few for 21 tokens"):
        main([*common, "--max_new_tokens", "18"])


def test_a_reader_that_leaves_early_is_no_error(tiny_checkpoint: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model_name_or_path", str(tiny_checkpoint), "--prompt", PROMPT]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--max_new_tokens", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Error" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
