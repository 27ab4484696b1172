"""The end of a run of several processes."""

from datetime import timedelta

import torch.distributed as dist

LONGEST_WAIT = timedelta(days=1)
"""For what the first process still does: saving a model, and uploading it."""


def end_together() -> None:
    """Waits until all processes of the run are here, and ends their connections.

    A process that ends with open connections may abort, because gloo's threads hold tensors when Python is gone
    (pytorch/pytorch#179291). The launcher would then stop the first process, which still saves or uploads the model.
    """
    if dist.is_initialized():
        # A group of its own, because the others wait for minutes only.
        dist.barrier(dist.new_group(backend="gloo", timeout=LONGEST_WAIT))
        dist.destroy_process_group()
