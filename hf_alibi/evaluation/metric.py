"""Perplexity as a metric of the `evaluate` library.

The library's own perplexity is downloaded from the Hub and loads a model by its id. This one needs no network, and
takes a model object:

    Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, max_length=1024, stride=256)

It has a module of its own because it needs two more packages, `datasets` and `evaluate`.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, missing_package
from .perplexity import bits_per_byte, encode_stream, token_nats

try:
    import datasets
    import evaluate
except ModuleNotFoundError as error:
    raise missing_package("hf_alibi.evaluation.metric", "train", error) from error

DESCRIPTION = "Perplexity of text under a causal language model, given as an object."
INPUTS_DESCRIPTION = """
Args:
    predictions: Documents, as texts or as lists of token ids. Texts are joined by end-of-sequence tokens.
    model: Any causal language model of Transformers.
    tokenizer: Of the model. Token ids do not need it, but without it there are no bits per byte.
    max_length: Length of the windows, in tokens. Shorter documents are read in one window.
    stride: Tokens between the starts of sliding windows. By default windows do not overlap.
    tokens_per_forward: Most tokens in one forward pass.

Returns:
    `nats` (the mean per target token), `perplexity`, `num_targets` and `bits_per_byte`.
"""


class Perplexity(evaluate.Metric):
    """Perplexity of documents read as one stream. See `evaluation/perplexity.py` and `INPUTS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
            ],
        )

    def _compute(
        self,
        *,
        predictions: list[str] | list[list[int]],
        model: PreTrainedModel,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stride: int | None = None,
        tokens_per_forward: int = 2048,
    ) -> dict[str, Any]:
        if not predictions:
            raise UserError("there are no predictions to score")
        if not isinstance(predictions[0], str):
            input_ids = torch.tensor([token for document in predictions for token in document])
        elif tokenizer is not None:
            input_ids = encode_stream(tokenizer, predictions)
        else:
            raise UserError("texts need a tokenizer; without one, give lists of token ids")
        length = min(max_length, max(1, len(input_ids) - 1))
        nats = token_nats(model, input_ids, length, stride, tokens_per_forward=tokens_per_forward)
        result: dict[str, Any] = {
            "nats": nats.mean().item(),
            "perplexity": nats.mean().exp().item(),
            "num_targets": len(nats),
        }
        if tokenizer is not None:
            result["bits_per_byte"] = bits_per_byte(nats, input_ids[1:], tokenizer)
        return result
