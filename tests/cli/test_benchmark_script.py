"""`hf_alibi benchmark`: tables, JSON and plots from tiny sizes, reasons for what does not run, and correct errors."""

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from hf_alibi.benchmark import converted, subjects
from hf_alibi.benchmark import measuring as benchmarking
from hf_alibi.benchmark.measuring import MeasuringArguments, compare, peak_mib
from hf_alibi.cli import benchmark as benchmark_command
from hf_alibi.errors import UserError
from hf_alibi.model.cache_names import CACHE_NAME

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
TINY = ["--rounds", "2", "--threads", "1", "--device", "cpu", "--no_measure_memory"]
TINY_MODEL = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--vocab_size", "64", *TINY]
MEASURED = {"implementation", "milliseconds", "ratio", "milliseconds_by_round", "peak_mib", "reason"}
OURS = ["ALiBi, sdpa", "ALiBi, sdpa, windows"]

Main = Callable[[list[str]], None]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes turns short. No test looks at the times."""
    monkeypatch.setattr(benchmarking, "SECONDS_A_TURN", 1e-3)


@pytest.fixture(scope="module")
def main() -> Main:
    return benchmark_command.main


def run(main: Main, folder: Path, *argv: str) -> dict[str, Any]:
    """Returns the JSON that the sub-command wrote, and checks that there is a plot."""
    main([*argv, "--output_prefix", str(folder / "new" / "result")])
    assert imread(folder / "new" / "result.png").std() > 0
    result = json.loads((folder / "new" / "result.json").read_text())
    assert {"cpu", "cores", "threads", "gpu", "torch", "transformers", "date"} <= result["environment"].keys()
    for record in result["records"]:
        assert record.keys() >= MEASURED | {"task", "dtype", "length"}
        if record["reason"] is None:
            assert len(record["milliseconds_by_round"]) == 2
    return result


def test_attention(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--lengths", "63", "700", "--dtypes", "float32", "bfloat16", "--num_heads", "3", "--head_dim", "8"]
    limits = ["--max_dense_length", "100", "--error_rows", "50", "--backends", "sdpa"]
    records = run(main, tmp_path, "attention", *sizes, *limits, *TINY)["records"]
    assert len(records) == 2 * 2 * 2 * 6
    left_out = {(r["implementation"], r["length"]) for r in records if r["reason"]}
    assert left_out == {(name, 700) for name in subjects.WITH_MASK}
    errors = {(r["dtype"], r["length"], r["implementation"]): r["max_error"] for r in records if r["max_error"]}
    assert len(errors) == 2 * (4 + 3)
    for (dtype, length, name), error in errors.items():
        assert error <= (2 if dtype == "float32" else 1.2) * errors[dtype, length, subjects.DENSE], name
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["task", "dtype", "tokens"]
    # Peak memory, and everything about long masks, is not measured.
    assert sum(" - " in line for line in lines) >= len(records) // 2
    assert f"forward, float32, 700, {subjects.DENSE}: longer than --max_dense_length" in lines


@pytest.mark.parametrize("length", [70, 700])
def test_errors_are_those_against_the_formula(length: int) -> None:
    """Causal attention without any bias has large errors, at sampled rows as at all rows."""
    problem = subjects.Problem(length, num_heads=2, head_dim=8, dtype="float32", device="cpu")
    names = [subjects.CAUSAL, *subjects.WITH_MASK, *OURS]
    sampled, everywhere = (subjects.max_errors(names, problem, rows) for rows in (60, length))
    assert sampled[subjects.CAUSAL] > 0.1
    for name in names:
        assert sampled[name] <= everywhere[name]
        assert name == subjects.CAUSAL or everywhere[name] < 1e-5


def test_model(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--train_lengths", "20", "--prefill_lengths", "20", "600", "--logits_length", "600"]
    options = ["--backends", "eager", "sdpa", "--max_eager_length", "100"]
    result = run(main, tmp_path, "model", *lengths, *options, *TINY_MODEL)
    assert len(result["records"]) == 3 * 7
    left_out = [(r["task"], r["implementation"]) for r in result["records"] if r["reason"]]
    assert left_out == [("prefill", subjects.EAGER)]
    for record in result["records"]:
        assert (record["tokens_per_second"] is None) == (record["reason"] is not None)
        assert record["implementation"] != subjects.LLAMA or record["ratio"] == 1
    assert [size["implementation"] for size in result["sizes"]] == [subjects.EAGER, *OURS, *subjects.PEERS]
    difference = {r["implementation"]: r["relative_difference"] for r in result["logits"]}
    assert difference[subjects.EAGER] == 0
    assert all(0 < difference[name] < 1e-5 for name in OURS)
    assert "parameters" in capsys.readouterr().out


def test_peers_have_about_as_many_parameters() -> None:
    """At the default size, and with few positions, because only GPT-2 has weights for positions."""
    shape = subjects.Shape(512, 6, 8, 8192, max_positions=1, dtype="float32", device="meta")
    mine = subjects.build_model(subjects.WINDOWED, shape).num_parameters()
    for name in subjects.PEERS:
        assert subjects.build_model(name, shape).num_parameters() == pytest.approx(mine, rel=0.005), name


@pytest.mark.parametrize("longest", [100, 150])
def test_generation(main: Main, tmp_path: Path, longest: int) -> None:
    options = [
        "--contexts",
        "30",
        "150",
        "--chunk_size",
        "40",
        "--new_tokens",
        "2",
        "--max_peer_context",
        str(longest),
    ]
    records = run(main, tmp_path, "generation", *options, *TINY_MODEL)["records"]
    assert [r["implementation"] for r in records] == list(subjects.DECODERS) * 2
    for record in records:
        left_out = record["length"] > longest and record["implementation"] in subjects.PEERS
        assert (record["reason"] is not None) == left_out
        assert (record["cache_mib"] is None) == (record["prefill_seconds"] is None) == left_out
        # There are 2 warm-up calls, and 2 rounds of 2 tokens.
        if record["implementation"] == subjects.DYNAMIC_CACHE:
            assert record["cache_mib"] == 2 * 32 * 4 * (record["length"] + 6) / 2**20


def test_chunks_and_cache_give_the_tokens_of_the_whole_text() -> None:
    shape = subjects.Shape(32, 1, 2, 64, max_positions=80, dtype="float32", device="cpu")
    for name in subjects.DECODERS:
        build, make_cache = subjects.way_to_decode(name, shape)
        decoder = subjects.Decoder(build, make_cache, context=70, chunk_size=32)
        text = torch.cat([subjects.random_tokens(build(), 70), decoder.token], dim=1)
        decoder()
        expected = build()(input_ids=text).logits[:, -2:].argmax(-1)
        assert torch.equal(torch.cat([text[:, -1:], decoder.token], dim=1), expected), name


def test_converted(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--train_lengths", "20", "--prefill_lengths", "20", "40", "--contexts", "30", "90"]
    options = ["--new_tokens", "2", "--chunk_size", "40", "--error_positions", "8", "80"]
    size = ["--hidden_size", "48", "--num_layers", "1", "--num_heads", "6", "--vocab_size", "64"]
    result = run(main, tmp_path, "converted", *lengths, *options, *size, *TINY)
    names = [name for family in converted.FAMILIES for name in (family, f"{family}, converted")]
    assert {r["implementation"] for r in result["records"]} == set(names)
    for name in names:
        found = [(r["task"], r["length"]) for r in result["records"] if r["implementation"] == name]
        assert found == [
            ("training step", 20), ("prefill", 20), ("prefill", 40), ("decoding", 30), ("decoding", 90),
        ]  # fmt: skip
    for record in result["records"]:
        assert record["reason"] is None
        assert record["implementation"] not in converted.FAMILIES or record["ratio"] == 1
        # There are 2 warm-up calls, and 2 rounds of 2 tokens.
        cache = 2 * 48 * 4 * (record["length"] + 6) / 2**20 if record["task"] == "decoding" else None
        assert record["cache_mib"] == cache or "converted" in record["implementation"]
    assert [(r["implementation"], r["length"]) for r in result["errors"]] == list(product(names, (8, 80)))
    assert "mean error" in capsys.readouterr().out


def test_converted_models_decode_with_the_cache_of_generate(tmp_path: Path) -> None:
    shape = subjects.Shape(48, 1, 6, 64, max_positions=64, dtype="float32", device="cpu")
    for name, folder in converted.save_both("BLOOM", shape, tmp_path).items():
        model = converted.load(folder, "float32", "cpu")
        make_cache = subjects.dynamic_cache if name == "BLOOM" else subjects.own_cache
        input_ids = subjects.random_tokens(model, 8)
        output = model.generate(input_ids, max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True)
        assert type(output[CACHE_NAME]) is type(make_cache(model)), name


def test_errors_of_converted_models_are_those_of_bfloat16(tmp_path: Path) -> None:
    """The exact model differs from neither in float32, and the column bias of BLOOM loses bits at far positions."""
    shape = subjects.Shape(48, 1, 6, 64, max_positions=800, dtype="float32", device="cpu")
    folders = converted.save_both("BLOOM", shape, tmp_path)
    own, ours = (converted.load(folder, "float32", "cpu") for folder in folders.values())
    input_ids = subjects.random_tokens(ours, 800)
    with torch.no_grad():
        exact = converted.load(folders["BLOOM, converted"], "float64", "cpu", "eager")(input_ids).logits
        for model in (own, ours):
            torch.testing.assert_close(model(input_ids).logits.double(), exact, rtol=0, atol=1e-4)
        half = converted.load(folders["BLOOM"], "bfloat16", "cpu")(input_ids).logits
    records = converted.errors_by_position(folders, [20, 800], "cpu")
    errors = {(r["implementation"], r["length"]): r["mean_error"] for r in records}
    assert errors["BLOOM", 800] == pytest.approx((half - exact)[0, 768:].abs().mean().item())
    assert errors["BLOOM", 20] == pytest.approx((half - exact)[0, :20].abs().mean().item())
    assert errors["BLOOM", 800] > 2 * errors["BLOOM, converted", 800] > 0


def test_peak_memory_is_that_of_the_call_alone() -> None:
    how = MeasuringArguments(device="cpu")
    assert peak_mib(partial(partial, torch.zeros, 2**24), how) == pytest.approx(64, abs=8)


def test_what_fails_gets_a_reason_and_leaves_the_others_alone() -> None:
    calls = {
        "works": partial(partial, torch.zeros, 3),
        "too large": partial(partial, torch.zeros, 2**38),
        "dies": partial(partial, os._exit, 1),
        "not asked": partial(partial, os._exit, 1),
    }
    how = MeasuringArguments(rounds=3, device="cpu", memory_gib=4)
    records = compare(calls, "works", how, label="test", skip={"not asked": "because"})
    assert records["works"]["ratio"] == 1
    assert records["works"]["reason"] is None
    assert "can't allocate memory" in records["too large"]["reason"]
    assert "BrokenProcessPool" in records["dies"]["reason"]
    assert records["not asked"]["reason"] == "because"
    assert all(record["milliseconds"] is None for name, record in records.items() if name != "works")


def test_memory_is_limited_where_it_is_not_measured() -> None:
    how = MeasuringArguments(rounds=1, device="cpu", memory_gib=4, measure_memory=False)
    records = compare({"too large": partial(partial, torch.zeros, 2**31)}, "too large", how, label="test")
    assert "can't allocate memory" in records["too large"]["reason"]
    # The limit no longer holds. These 8 GiB are never touched.
    torch.empty(2**31)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["attention", "--lengths", "8", "0"], "--lengths must be from 1 to"),
        (["attention", "--device", "tpu"], "must be cpu or cuda"),
        (["model", "--hidden_size", "50", "--num_heads", "8"], "does not divide into 8 heads"),
        (["generation", "--output_prefix", f"{SCRIPT}/result"], "cannot write to --output_prefix"),
        (["generation", "--memory_gib", "nan"], "--memory_gib must be from 0.001"),
        (["generation", "--rounds", "0"], "--rounds must be from 1"),
        (["attention", "--device", "cuda:99"], "not available"),
        ([], "the following arguments are required: command"),
        (["speed"], "invalid choice: 'speed'"),
        (["attention", "--dtypes", "int8"], "invalid choice: 'int8'"),
        (["model", "--length", "5"], "unknown arguments: --length 5"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_measured(main: Main, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(argv)
