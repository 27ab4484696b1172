"""Writes a model card from facts: the config, the files of training and evaluation, and the author's statements.

    card = model_card(model, "me/books", "runs/books", CardArguments(license="apache-2.0"))
    card.save("README.md")

Nothing is estimated or assumed: the card leaves out what is unknown. Facts about training come from the JSON files
that `hf_alibi.training.train` writes beside the weights, never from the pickle that Trainer writes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from ..evaluation.perplexity import Result
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from ..tables import markdown

PLOT_NAME = "perplexity_by_length.png"
# `hf_alibi convert` writes it beside the weights.
FACTS = "conversion.json"

CONFIG_FACTS = {
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden size",
    "num_attention_heads": "Query heads",
    "num_key_value_heads": "Key and value heads",
    "head_dim": "Width of a head",
    "intermediate_size": "Width of the feed-forward layers",
    "hidden_act": "Activation",
    "mlp_gated": "Gated feed-forward layers",
    "use_parallel_residual": "Feed-forward layers parallel to the attention",
    "norm_type": "Norm",
    "qk_norm": "QK-norm",
    "qk_norm_gain": "Gain of QK-norm",
    "clip_qkv": "Queries, keys and values clipped to",
    "vocab_size": "Vocabulary",
    "training_length": "Training length (tokens)",
    "alibi_scaling": "Scaling of the slopes",
}

TRAINING_FACTS = {
    "training_args.json": {
        "learning_rate": "Learning rate",
        "lr_scheduler_type": "Schedule",
        "warmup_steps": "Warmup (steps, or a fraction of them)",
        "optim": "Optimizer",
        "weight_decay": "Weight decay",
        "per_device_train_batch_size": "Sequences per device and forward pass",
        "gradient_accumulation_steps": "Forward passes per step",
        "bf16": "bfloat16 mixed precision",
        "seed": "Seed",
    },
    "trainer_state.json": {"global_step": "Steps", "epoch": "Epochs"},
    "all_results.json": {
        "train_loss": "Training loss (mean of all steps, nats per token)",
        "eval_loss": "Validation loss (nats per token)",
        "eval_perplexity": "Validation perplexity (per token)",
        "eval_bits_per_byte": "Validation bits per byte",
    },
}

CITATION = """\
```bibtex
@inproceedings{press2022train,
  title     = {Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation},
  author    = {Ofir Press and Noah A. Smith and Mike Lewis},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2108.12409},
}
```"""


@dataclass
class CardArguments:
    """What only the author of a model can state, and where the evaluation is."""

    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights, as the Hub abbreviates it: apache-2.0, mit, …"}
    )
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the text: en, de, code, …"})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of the model that training began with."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the datasets trained on."})
    training_data: str | None = field(default=None, metadata={"help": "The training text, described in a phrase."})
    evaluation: Path | None = field(
        default=None, metadata={"help": "PREFIX.json of hf_alibi evaluate, with PREFIX.png beside it."}
    )
    evaluation_text: str | None = field(
        default=None, metadata={"help": "Name or Hub id of the text evaluated on; --evaluation needs it."}
    )

    @property
    def plot(self) -> Path | None:
        """The plot beside the evaluation."""
        return None if self.evaluation is None else self.evaluation.with_suffix(".png")


def model_card(
    model: AlibiGPTForCausalLM, repo_id: str, folder: str | Path, arguments: CardArguments | None = None
) -> ModelCard:
    """Returns the card of `model` for the repository `repo_id`.

    Args:
        model: The model.
        repo_id: Namespace and name on the Hub.
        folder: Where the model was saved, and where the files of training are.
        arguments: What the author states.

    Raises:
        UserError: If a file cannot be read, or the evaluation belongs to another model or its text has no name.
    """
    arguments = arguments or CardArguments()
    results = read_evaluation(arguments, Path(folder).resolve().name, model.config.training_length)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["alibi"],
        license=arguments.license,
        language=arguments.language,
        base_model=arguments.base_model,
        datasets=arguments.datasets,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=eval_results(results, str(arguments.evaluation_text)) if results else None,
    )
    sections = [
        f"# {repo_id.split('/')[-1]}\n\n{summary(model)}",
        f"## Use\n\n{usage(repo_id)}",
        f"## Evaluation\n\n{evaluation(results, arguments)}" if results else "",
        f"## Conversion\n\n{conversion(Path(folder))}" if (Path(folder) / FACTS).is_file() else "",
        f"## Training\n\n{training(Path(folder), arguments)}",
        f"## Architecture\n\n{architecture(model)}",
        f"## Head windows\n\n{windows(model)}",
        f"## Limits\n\n{limits(results)}",
        f"## Licence\n\n{licence(arguments)}",
        f"## Citation\n\n{CITATION}",
    ]
    return assemble(data, sections)


def assemble(data: ModelCardData, sections: Sequence[str]) -> ModelCard:
    """Returns a card with this metadata and those of the sections that are not empty."""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def read_evaluation(arguments: CardArguments, label: str, training_length: int | None) -> list[Result]:
    """Returns this model's results from the file of `hf_alibi evaluate`, one for each length; [] without a file."""
    path = arguments.evaluation
    if path is None:
        return []
    if not arguments.evaluation_text:
        raise UserError("--evaluation needs --evaluation_text, the name of the text that was evaluated on")
    try:
        models = json.loads(path.read_text("utf-8"))["models"]
        entries = [entry for entry in models if len(models) == 1 or entry["label"] == label]
        if len(entries) != 1:
            raise UserError(f"{path} has {len(entries)} models with the label {label!r}; expected one")
        results = [_checked(Result(**result)) for result in entries[0]["results"]]
        evaluated_length = entries[0]["training_length"]
        if not results:
            raise ValueError("it has no results")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what hf_alibi evaluate writes: {error!r}") from error
    if evaluated_length != training_length:
        raise UserError(
            f"{path} is of a model trained at length {evaluated_length}, this one was at {training_length}"
        )
    if not path.with_suffix(".png").is_file():
        raise UserError(f"{path} has no plot {path.with_suffix('.png').name} beside it")
    return results


def _checked(result: Result) -> Result:
    """Returns `result`. Raises `TypeError` if its fields are not what `Result` declares."""
    counts = (result.length, result.stride, result.num_targets)
    values = [
        result.nats,
        result.perplexity,
        *(v for v in (result.bits_per_byte, result.nats_stderr) if v is not None),
    ]
    if not all(type(count) is int and count > 0 for count in counts):
        raise TypeError(f"length, stride and num_targets are {counts}")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise TypeError(f"losses are {values}")
    return result


def eval_results(results: list[Result], text: str) -> list[EvalResult]:
    """Returns the entries of the model-index in the metadata: perplexity and bits per byte at every length."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=text,
            dataset_name=text,
            metric_type=metric,
            metric_value=round(value, 4),
            metric_name=f"{metric.replace('_', ' ')} at {result.length} tokens",
            metric_args={"length": result.length, "stride": result.stride},
        )
        for result in results
        for metric, value in [("perplexity", result.perplexity), ("bits_per_byte", result.bits_per_byte)]
        if value is not None
    ]


def summary(model: AlibiGPTForCausalLM) -> str:
    """Returns two sentences that say what the model is."""
    kind = "learned" if model.config.alibi_slopes_trainable else "fixed"
    return (
        f"A decoder-only language model of {model.num_parameters():,} parameters. It has no position embeddings: each "
        f"attention head subtracts a {kind} multiple of the distance from its scores "
        '([Press, Smith and Lewis, "Train Short, Test Long"](https://arxiv.org/abs/2108.12409)), so that it can read '
        f"texts longer than the {model.config.training_length:,} tokens it was trained at."
    )


def usage(repo_id: str) -> str:
    """Returns how to load the model with and without the package."""
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

The code of the model is in this repository; look at it before you trust it. Where the package `hf_alibi` is installed,
`import hf_alibi` takes the place of `trust_remote_code=True`. Saved with Transformers {transformers.__version__} and
PyTorch {torch.__version__.split("+")[0]}."""


def evaluation(results: list[Result], arguments: CardArguments) -> str:
    """Returns the table of perplexity against length, and the plot."""
    windows = "that do not overlap"
    if any(result.stride < result.length for result in results):
        stride = f"{results[0].stride:,}"
        windows = f"that begin {stride} tokens apart and score their last {stride} targets"
    rows = []
    for result in results:
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f}"
        rows.append([f"{result.length:,}", f"{result.perplexity:.2f}", bits, f"{result.num_targets:,}"])
    return (
        f"On {arguments.evaluation_text}, in windows {windows}. Every target is scored once, and the targets are the "
        f"same at every length.\n\n"
        f"{markdown(['length in tokens', 'perplexity per token', 'bits per byte', 'targets'], rows)}\n\n"
        f"![Perplexity against length]({PLOT_NAME})"
    )


def training(folder: Path, arguments: CardArguments) -> str:
    """Returns a table of the known data, arguments and results of training."""
    rows = []
    if arguments.base_model:
        rows.append(["Began with", arguments.base_model])
    if arguments.datasets or arguments.training_data:
        rows.append(["Data", "; ".join([*(arguments.datasets or []), *filter(None, [arguments.training_data])])])
    for name, labels in TRAINING_FACTS.items():
        if (folder / name).is_file():
            try:
                facts = json.loads((folder / name).read_text("utf-8"))
                if not isinstance(facts, dict):
                    raise ValueError(f"it holds a {type(facts).__name__}")
            except ValueError as error:
                raise UserError(f"{folder / name} is damaged: {error}; put it right or remove it") from error
            rows += [[label, shown(facts[key])] for key, label in labels.items() if facts.get(key) is not None]
    return markdown(["", ""], rows) if rows else "Nothing about its training is recorded."


def conversion(folder: Path) -> str:
    """Returns the source of converted weights, what was folded into them, what differs, and how they were verified."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        found = facts["verification"]
        figures = {"whole text": found["full"]}
        if "padded" in found:  # not for a GGUF file
            figures |= {"padded on the left": found["padded"], "from a cache": found["cached"]}
        rows = [[f"{name}", f"{value:.1g}"] for name, value in figures.items()]
        rows += [[f"{name}, for comparison", f"{value:.1g}"] for name, value in found["other"].items()]
        notes = [f"- {note}" for note in [*facts["folded"], *facts["differs"]]]
        return "\n\n".join(
            [
                f"Converted {facts['direction']}: the source was `{facts['source']}`, weights are {facts['dtype']}.",
                *(["\n".join(notes)] if notes else []),
                f"Compared in float32 with {found['against']} on {found['num_tokens']} tokens: {found['text']}.",
                markdown(["logits", "largest difference, over the largest logit"], rows),
            ]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FACTS} is not what hf_alibi convert writes: {error!r}") from error


def architecture(model: AlibiGPTForCausalLM) -> str:
    """Returns the table of the config."""
    slopes = model.model.slopes(model.model.embed_tokens.weight).tolist()
    rows = [["Parameters", shown(model.num_parameters())]]
    rows += [[label, shown(getattr(model.config, name))] for name, label in CONFIG_FACTS.items()]
    return markdown(["", ""], [*rows, ["Slopes of the heads", ", ".join(map(shown, slopes))]])


def windows(model: AlibiGPTForCausalLM) -> str:
    """Returns the windows of the heads, from the trained gains of the QK-norm, and what they guarantee."""
    guarantees = model.model.window_guarantees()
    if guarantees is not None:
        widest = max(guarantees, key=lambda guarantee: guarantee.score_bound)
        return (
            "A head skips the keys that contribute less than rounding. These are the windows of the layer with the "
            f"widest ones, from its trained gains:\n\n```\n{widest}\n```"
        )
    if not model.config.window_tolerance:
        return "Off: every query looks at every key."
    if not model.config.qk_norm:
        return (
            "Without QK-norm, each call computes windows from the norms of its queries and keys. The keys that are "
            f"skipped have at most the fraction {model.config.window_tolerance:.3g} of the attention."
        )
    if model.config.slopes_depend_on_length:
        return "With a dynamic scaling of the slopes, the windows grow with the text."
    return (
        "The norms of queries and keys have an adapter or a hook, so each call computes windows from its own queries "
        "and keys."
    )


def limits(results: list[Result]) -> str:
    """Returns what has not been measured."""
    evaluated = f"up to {results[-1].length:,} tokens; nothing is known beyond" if results else "at no length"
    return (
        f"- It has been evaluated {evaluated}.\n"
        "- ALiBi bounds how far a head can see: a model that reads a longer text without harm may not use all of it.\n"
        "- It continues text. Whether what it writes is true, fair or safe has not been measured."
    )


def licence(arguments: CardArguments) -> str:
    """Returns the licences of code and weights."""
    return f"The model's code: Apache-2.0. {weights_licence(arguments.license)}"


def weights_licence(license: str | None) -> str:
    """Returns a sentence with the licence of the weights."""
    return f"The weights: {license}." if license else "None is stated for the weights."


def shown(value: object) -> str:
    """Returns a value in readable form: 1,024, 0.0003, yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
