"""Several processes: every way of sharing a training run gives the losses, gradients and weights of one process."""

from pathlib import Path

import pytest
from several_processes import in_processes


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """DDP, FSDP2, tensor and context parallelism, with and without checkpointing, fixed and trained slopes."""
    output = in_processes(Path(__file__).with_name("ranks_train.py"), tmp_path)
    assert output.count("as one process") == 2 * 8


@pytest.mark.slow
def test_two_pairs_train_as_one_process_does(tmp_path: Path) -> None:
    """Tensor parallelism in each pair, and FSDP2 among them."""
    output = in_processes(Path(__file__).with_name("ranks_train.py"), tmp_path, processes=4)
    assert output.count("as one process") == 2
    assert "match nothing" not in output
