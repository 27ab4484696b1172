"""The table of GPUs, and which one a driver's name means."""

import pytest

from hf_alibi.planning.gpus import GPUS, known_gpu


@pytest.mark.parametrize(
    ("device_name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", None),
    ],
)
def test_a_drivers_name_is_known_or_not_guessed(device_name: str, key: str | None) -> None:
    assert known_gpu(device_name) == (GPUS[key] if key else None)


def test_every_gpu_is_faster_in_16_bits_and_says_its_source() -> None:
    for gpu in GPUS.values():
        assert gpu.tflops_16 > gpu.tflops_32 > 0
        assert gpu.memory_gb > 0
        assert gpu.source
