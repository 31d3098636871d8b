"""One merge in a process of its own: what it held above its imports, and what it took.

    python -m benchmarks.merge_peak_side SIDE < JOB

`JOB` is a JSON object: `base`, `adapter` and `out` are folders. The last line of what is printed is
the report. The imports are all that the side's merge will ever import, done before the peak is
reset; nothing else is touched before it. This file needs nothing of qft's, so that it runs in an
environment without qft.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.channel import peak_bytes, reset_peak, resident_bytes, versions

Merge = Callable[[str, str, str], None]  # base, adapter, out


def qft() -> Merge:
    """qft's own, as `qft merge` calls it."""
    import transformers.models.auto.tokenization_auto
    import transformers.models.encoder_decoder.configuration_encoder_decoder
    import transformers.models.llama.modeling_llama  # noqa: F401

    import adapters.from_elsewhere
    import adapters.lora  # noqa: F401
    from qft.export.delivery import merge

    def run(base: str, adapter: str, out: str) -> None:
        merge(adapter, out, base=base)

    return run


def peft(*, best: bool = False) -> Merge:
    """PEFT's documented way, with its defaults or with what its pages advise for little memory."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def run(base: str, adapter: str, out: str) -> None:
        more = {"low_cpu_mem_usage": True} if best else {}
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, adapter, **more).merge_and_unload()
        model.save_pretrained(out, **({"max_shard_size": "200MB"} if best else {}))

    return run


def mergekit(*, copy: bool = False) -> Merge:
    """mergekit-yaml's `passthrough` of base+adapter; with ``copy`` of the base alone.

    With an adapter it has PEFT merge the whole model into a cache folder first. Its options for
    little memory are used: `--lazy-unpickle`, and `--out-shard-size` (in parameters). Its
    `--low-cpu-memory` holds tensors on a GPU, which there is not.
    """
    import peft
    import transformers.models.llama.modeling_llama  # noqa: F401
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    assert peft

    def run(base: str, adapter: str, out: str) -> None:
        named = base if copy else f"{base}+{adapter}"
        text = f"merge_method: passthrough\nmodels: [{{model: '{named}'}}]\ndtype: bfloat16\n"
        options = MergeOptions(
            lora_merge_cache=f"{out}-cache", copy_tokenizer=False,
            lazy_unpickle=True, out_shard_size=100_000_000,
        )  # fmt: skip
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)

    return run


SIDES: dict[str, Callable[[], Merge]] = {
    "qft": qft,
    "peft": peft,
    "peft-best": lambda: peft(best=True),
    "mergekit": mergekit,
    "mergekit-copy": lambda: mergekit(copy=True),
}


def main() -> None:
    """Runs the side once and reports."""
    job = json.load(sys.stdin)
    merge = SIDES[sys.argv[1]]()
    gc.collect()
    known = set(sys.modules)
    began = reset_peak()
    imports = resident_bytes()
    cpu, wall = time.process_time(), time.monotonic()
    merge(job["base"], job["adapter"], job["out"])
    report = {
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "imports_bytes": imports,
        "peak_bytes": peak_bytes(),
        "peak_was_reset": began,
        "files": sum(1 for _ in Path(job["out"]).glob("*.safetensors")),
        "late_imports": sorted(set(sys.modules) - known),
        "versions": versions(),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
