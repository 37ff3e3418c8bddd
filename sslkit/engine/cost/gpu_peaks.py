"""Peak speeds of GPUs, from the vendors' data sheets, to which the speed of training is compared (MFU)."""

import re
from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True)
class Peaks:
    """TFLOP/s of a card in dense matrix products with sums in float32. None: the card does not have it."""

    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float


# By the words of the name that CUDA gives, in this order: the first that is found counts. Where a data sheet gives only
# the speed with sparsity, half of it. GeForce cards: with sums in float32, as PyTorch computes.
CARDS = {
    r"GB200": Peaks(80, 1250, 2500, 2500),
    r"B200": Peaks(75, 1125, 2250, 2250),
    r"H200|GH200|H100 80GB HBM3": Peaks(67, 494.7, 989.4, 989.4),
    r"H100 NVL": Peaks(60, 417.5, 835, 835),
    r"H100 PCIe|H100 80GB HBM2e": Peaks(51, 378, 756, 756),
    r"H20": Peaks(44, 74, 148, 148),
    r"A100|A800": Peaks(19.5, 156, 312, 312),
    r"A10G": Peaks(31.2, 35, 70, 70),
    r"A10": Peaks(31.2, 62.5, 125, 125),
    r"A30": Peaks(10.3, 82, 165, 165),
    r"A40": Peaks(37.4, 74.8, 149.7, 149.7),
    r"RTX A6000": Peaks(38.7, 77.4, 154.8, 154.8),
    r"RTX 6000 Ada Generation": Peaks(91.1, 182.1, 364.2, 364.2),
    r"L40S": Peaks(91.6, 183, 362, 362),
    r"L40": Peaks(90.5, 90.5, 181, 181),
    r"L4": Peaks(30.3, 60, 121, 121),
    r"RTX 5090": Peaks(104.8, 104.8, 209.5, 209.5),
    r"RTX 4090": Peaks(82.6, 82.6, 165.2, 165.2),
    r"RTX 3090": Peaks(35.6, 35.6, 71, 71),
    r"V100-PCIE": Peaks(14, None, None, 112),
    r"V100-SXM2|V100-SXM3": Peaks(15.7, None, None, 125),
    r"T4": Peaks(8.1, None, None, 65),
    r"MI325X|MI300X": Peaks(163.4, 653.7, 1307.4, 1307.4),
}
OTHERS = r"MIG|Laptop|Max-Q|Mobile|\bTi\b|\bD\b|SUPER"  # a part of a card, or a card with other numbers


def peak_flops(card: str, precision: str, *, tf32: bool) -> float | None:
    """FLOP/s of a card at the precision of a run (``no``: float32, with ``tf32`` TF32); None if it is not known.

    Args:
        card: What `torch.cuda.get_device_name` returns.
    """
    if re.search(OTHERS, card):
        return None
    peaks = next((peaks for names, peaks in CARDS.items() if re.search(rf"\b({names})\b", card)), None)
    if peaks is None:
        return None
    kind = {"no": "tf32" if tf32 and peaks.tf32 else "fp32"}.get(precision, precision)
    tera: float | None = getattr(peaks, kind, None)
    return None if tera is None else tera * TERA
