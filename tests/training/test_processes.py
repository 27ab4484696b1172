"""The end of a run of several processes."""

from pathlib import Path

import pytest
from several_processes import in_processes

PROGRAM = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from hf_alibi.training.processes import end_together

model = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=1))
assert dist.get_world_size() == 2
dist.barrier()
if dist.get_rank() == 0:
    time.sleep(3)
    model.touch()
end_together()
assert model.exists()
assert not dist.is_initialized()
end_together()
"""


@pytest.mark.slow
def test_others_wait_for_the_first_one_beyond_the_timeout(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    in_processes(program, tmp_path / "model")
