"""Loads checkpoints with the code that they bring, as a user without this package does.

    python -P fresh_program.py REQUESTS RESULTS

REQUESTS is a JSON file and RESULTS the safetensors file of `fresh_process.run_fresh`, which starts this program. -P
keeps the folder of this file off the import path.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor


@torch.no_grad()
def outputs(request: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the outputs of the checkpoint that a `fresh_process.Request` names, by name."""
    checkpoint, revision = request["checkpoint"], request["revision"]
    # Only matters for a head that the checkpoint lacks.
    torch.manual_seed(0)
    model = getattr(transformers, request["auto_class"]).from_pretrained(
        checkpoint, revision=revision, trust_remote_code=True, use_safetensors=True, dtype=torch.float32
    )
    if request["text"] is None:
        input_ids = torch.tensor(request["input_ids"])
    else:
        # Without the last argument, Transformers asks on stdin about code that a tokenizer does not need.
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
        input_ids = tokenizer(request["text"], return_tensors="pt")["input_ids"]
    found = {name: value.contiguous() for name, value in model(input_ids, use_cache=False).items()}
    for cache in request["caches"]:
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        found[cache] = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    is_remote = type(model).__module__.startswith("transformers_modules.")
    return found | {"input_ids": input_ids, "is remote": torch.tensor(is_remote)}


def main() -> None:
    """Computes what REQUESTS asks for, and writes it to RESULTS."""
    # With this entry, importing the package raises an error even where it is installed.
    sys.modules["hf_alibi"] = None  # type: ignore[assignment]
    requests, results = map(Path, sys.argv[1:])
    found = {
        f"{name} {key}": value
        for name, request in json.loads(requests.read_text(encoding="utf-8")).items()
        for key, value in outputs(request).items()
    }
    save_file(found, results)


if __name__ == "__main__":
    main()
