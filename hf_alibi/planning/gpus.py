"""Peak speed and memory of GPUs, as their makers state them.

Speeds are dense matrix products: where a maker states the speed with structured sparsity, it is twice this. Memory is
as sold, 10^9 bytes a GB. A driver shows a few percent more, which pays for its own context and for fragmentation.
"""

from typing import NamedTuple


class GPU(NamedTuple):
    """A GPU.

    Attributes:
        name: As its maker writes it.
        tflops_16: 10^12 operations a second in bfloat16 and float16, accumulated in float32.
        tflops_32: The same in float32, without TF32, which PyTorch uses on request only.
        memory_gb: 10^9 bytes.
        source: Where the maker states it.
    """

    name: str
    tflops_16: float
    tflops_32: float
    memory_gb: float
    source: str


GPUS = {
    "a100-40gb": GPU("A100 40GB SXM", 312, 19.5, 40, "NVIDIA A100 datasheet"),
    "a100": GPU("A100 80GB SXM", 312, 19.5, 80, "NVIDIA A100 datasheet"),
    "h100": GPU("H100 SXM", 989, 67, 80, "NVIDIA H100 datasheet, half of the speed with sparsity"),
    "h100-pcie": GPU("H100 PCIe", 756, 51, 80, "NVIDIA H100 datasheet, half of the speed with sparsity"),
    "h200": GPU("H200 SXM", 989, 67, 141, "NVIDIA H200 datasheet, half of the speed with sparsity"),
    "b200": GPU("B200", 2250, 75, 180, "NVIDIA HGX B200 specifications, an eighth of a board, without sparsity"),
    "l4": GPU("L4", 121, 30.3, 24, "NVIDIA L4 datasheet, half of the speed with sparsity"),
    "l40s": GPU("L40S", 362, 91.6, 48, "NVIDIA L40S datasheet"),
    "rtx3090": GPU("GeForce RTX 3090", 71, 35.6, 24, "NVIDIA Ampere GA102 whitepaper"),
    "rtx4090": GPU("GeForce RTX 4090", 165.2, 82.6, 24, "NVIDIA Ada architecture whitepaper"),
    "mi300x": GPU("Instinct MI300X", 1307.4, 163.4, 192, "AMD Instinct MI300X data sheet"),
}


def known_gpu(device_name: str) -> GPU | None:
    """Returns the GPU that a driver calls `device_name`, or `None` if the table does not have it.

    Variants of the same name differ in speed, so a name that fits several entries or none is not guessed.
    """
    words = device_name.upper().replace("-", " ").split()
    if "H100" in words:
        variant = {"PCIE": "h100-pcie", "NVL": None}
        found = next((variant[word] for word in words if word in variant), "h100")
        return GPUS[found] if found else None
    models = {"A100": "a100", "H200": "h200", "B200": "b200", "L4": "l4", "L40S": "l40s", "MI300X": "mi300x"}
    models |= {"3090": "rtx3090", "4090": "rtx4090"}
    if any(word in ("NVL", "TI", "D", "LAPTOP") for word in words):
        return None
    return next((GPUS[models[word]] for word in words if word in models), None)
