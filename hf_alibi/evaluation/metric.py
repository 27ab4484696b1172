"""Perplexity as a metric of the `evaluate` library.

The library's own perplexity is downloaded from the Hub and loads a model by its id; this one needs no network and
takes the model as an object::

    Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, max_length=1024, stride=256)

It is a module apart because it needs two more packages, `datasets` and `evaluate`.
"""

from typing import Any

import datasets
import evaluate
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .perplexity import bits_per_byte, encode_stream, token_nats

DESCRIPTION = "Perplexity of text under a causal language model, given as an object."
INPUTS_DESCRIPTION = """
Args:
    predictions: documents, as texts or as lists of token ids; texts are joined by end-of-sequence tokens.
    model: any causal language model of Transformers.
    tokenizer: of the model; not needed for token ids, but without it there are no bits per byte.
    max_length: length of the windows, in tokens; one shorter window if the documents have fewer.
    stride: tokens between the starts of sliding windows; default: windows do not overlap.
    tokens_per_forward: tokens in one forward pass at most.

Returns:
    `nats`, the mean per target token; `perplexity`; `num_targets`; and `bits_per_byte`.
"""


class Perplexity(evaluate.Metric):
    """Perplexity of documents read as one stream, as `evaluation/perplexity.py` explains; see `INPUTS_DESCRIPTION`."""

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
