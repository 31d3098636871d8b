"""The row that PEFT's own method comparison publishes for LoRA, with the engine and without.

    python benchmarks/gpu/peft_row.py

Llama-3.2-3B in bf16, r=32 on queries and values, batches of 4 with up to 768 tokens. PEFT publishes
20.76 GiB at most and 7,245 tokens/s late in the run, on an L40S. Another card gives other speeds,
and here every row of a batch is full: compare the sides here with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_models import Case
from gpu_rows import Rows, parser
from gpu_sides import FarSide, Runs, Side
from throughput import run

PUBLISHED = {"allocated_peak_gib": 20.76, "tokens_per_second": 7245, "device": "NVIDIA L40S"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    options = parser(__doc__)
    options.add_argument("--shape", default="llama-3.2-3b")
    options.add_argument("--length", type=int, default=768)
    options.add_argument("--blocks", type=int, default=5)
    options.add_argument("--block-seconds", type=float, default=1.0)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--in-process", action="store_true")
    chosen = options.parse_args(arguments)
    case = Case(chosen.shape, length=chosen.length, batch=4, rank=32, targets=("q_proj", "v_proj"),
                dtype=chosen.dtype, device=chosen.device)  # fmt: skip
    make: Callable[[str], Runs] = Side if chosen.in_process else FarSide
    print(f"published by PEFT: {PUBLISHED}")
    run([case], ["qft", "peft", "peft-autocast"], Rows(chosen.out, "peft_row", chosen.device),
        make, blocks=chosen.blocks, seconds=chosen.block_seconds)  # fmt: skip


if __name__ == "__main__":
    main()
