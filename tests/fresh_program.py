"""What somebody runs who has only torch and transformers: load checkpoints with the code they bring along.

    python -I -S fresh_program.py SITE_PACKAGES REQUESTS RESULTS

REQUESTS is the JSON file and RESULTS the safetensors file of `fresh.run_fresh`, which starts this program. -S keeps
the installed packages out of reach, so that only those in the folder SITE_PACKAGES can be imported.
"""

import json
import sys
from pathlib import Path

site_packages, requests, results = sys.argv[1:]
sys.path.append(site_packages)

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.set_num_threads(1)
tensors = {}
for name, request in json.loads(Path(requests).read_text()).items():
    torch.manual_seed(0)  # a head that the checkpoint lacks is initialised at random
    model = getattr(transformers, request["auto_class"]).from_pretrained(
        request["checkpoint"], revision=request["revision"], trust_remote_code=True
    )
    input_ids = torch.tensor(request["input_ids"])
    with torch.no_grad():
        for key, value in model(input_ids, use_cache=False).items():
            tensors[f"{name} {key}"] = value.contiguous()
    for cache in request["caches"]:
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        tensors[f"{name} {cache}"] = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    tensors[f"{name} is remote"] = torch.tensor(type(model).__module__.startswith("transformers_modules."))
save_file(tensors, results)
