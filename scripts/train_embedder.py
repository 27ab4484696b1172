"""Trains a small embedder from scratch and measures retrieval at lengths beyond the trained one; takes a few minutes.

    python scripts/train_embedder.py --pooling mean --output_dir runs/embedder

needs `pip install 'hf_alibi[train]' sentence-transformers`. The texts are the source files of Python's standard
library. A pair is two neighbouring pieces of one file; the other pieces of a batch are the negatives
(`MultipleNegativesRankingLoss`, the InfoNCE loss of arXiv 1807.03748). The longest files are held out. In each of
them, the measurement takes the `length` tokens before a place in the middle (the same for all lengths), and looks for
the `length` tokens after it among those of all held-out files. Recall@1 is the share that is found. The last column
cuts every text to the trained length, as a model with a limit would.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import PreTrainedTokenizerBase, set_seed

from hf_alibi import AlibiGPTConfig, AlibiGPTModel
from hf_alibi.training.data import standard_library_corpus, train_tokenizer

# Small, so that many files have 2 * 8,192 tokens.
VOCAB_SIZE = 1024


def main() -> None:
    """Trains, saves, loads and measures."""
    parser = argparse.ArgumentParser(description="Trains a small embedder and measures retrieval beyond its length.")
    parser.add_argument("--output_dir", default="runs/embedder")
    parser.add_argument("--pooling", choices=["mean", "lasttoken"], default="mean")
    parser.add_argument("--training_length", type=int, default=128, help="tokens of a text in training")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--held_out", type=int, default=32, help="files that are searched, the longest ones")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_seed(options.seed)

    corpus = standard_library_corpus()
    files = sorted(concatenate_datasets([corpus["train"], corpus["validation"]])["text"], key=len)
    training, held_out = files[: -options.held_out], files[-options.held_out :]
    tokenizer = train_tokenizer(training, VOCAB_SIZE)
    model = new_model(tokenizer, options)
    arguments = SentenceTransformerTrainingArguments(
        options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        warmup_steps=options.max_steps // 10,
        logging_steps=max(1, options.max_steps // 10),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    pairs = training_pairs(training, tokenizer, options.training_length)
    SentenceTransformerTrainer(
        model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)
    ).train()
    model.save_pretrained(options.output_dir)

    loaded = SentenceTransformer(options.output_dir)
    middle = max(options.lengths)
    results = [measure(loaded, held_out, middle, length, options.training_length) for length in options.lengths]
    print("| tokens | files | recall@1 | cut to the trained length |\n|---|---|---|---|")
    for row in results:
        print(f"| {row['length']:,} | {row['files']} | {row['recall']:.2f} | {row['recall_cut']:.2f} |")
    (Path(options.output_dir) / "retrieval.json").write_text(json.dumps(results, indent=2))


def new_model(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> SentenceTransformer:
    """Returns an untrained embedder. The folder gets the model and its tokenizer."""
    config = AlibiGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        training_length=options.training_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    start = Path(options.output_dir) / "start"
    AlibiGPTModel(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    # Otherwise each text becomes a message of the chat template.
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    body = Transformer(str(start), modality_config=text, module_output_name="token_embeddings")
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), options.pooling)])


def pieces(text: str, tokenizer: PreTrainedTokenizerBase, length: int, start: int = 0) -> list[str]:
    """Returns the text from the token `start` on in pieces of `length` tokens, without the last, shorter one."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    starts = range(start, len(ids) - length + 1, length)
    return [str(tokenizer.decode(ids[start : start + length])) for start in starts]


def training_pairs(files: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Returns neighbouring pieces of the files as the columns `anchor` and `positive`."""
    cut = [pieces(text, tokenizer, length) for text in files]
    anchors = [piece for parts in cut for piece in parts[: len(parts) // 2 * 2 : 2]]
    positives = [piece for parts in cut for piece in parts[1::2]]
    return Dataset.from_dict({"anchor": anchors, "positive": positives}).shuffle(seed=0)


def measure(model: SentenceTransformer, files: list[str], middle: int, length: int, cut: int) -> dict[str, float]:
    """Returns recall@1 for texts of `length` tokens before and after `middle`, read whole and to token `cut`."""
    pairs = [pieces(text, model.tokenizer, length, start=middle - length)[:2] for text in files]
    pairs = [pair for pair in pairs if len(pair) == 2]
    recalls = []
    for limit in (model.max_seq_length, cut):
        with_limit, model.max_seq_length = model.max_seq_length, limit
        queries, texts = (
            model.encode(list(side), batch_size=4, convert_to_tensor=True) for side in zip(*pairs, strict=True)
        )
        model.max_seq_length = with_limit
        found = model.similarity(queries, texts).argmax(dim=1).cpu()
        recalls.append((found == torch.arange(len(pairs))).float().mean().item())
    return {"length": length, "files": len(pairs), "recall": recalls[0], "recall_cut": recalls[1]}


if __name__ == "__main__":
    main()
