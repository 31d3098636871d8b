"""One step on the way to a GGUF file, in a process of its own: what it held and what it took.

    python -m benchmarks.gguf_peak_side STEP < JOB

`JOB` is a JSON object: `base`, `adapter`, `merged` and `out` are folders, `f16` and `quantized`
files, `sources` llama.cpp's, `threads` a number. The last line of what is printed is the report.
Everything a step will ever import is imported before the peak is reset.
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

Job = dict[str, Any]
Step = Callable[[], str]  # does the work; what it wrote
LLAMA_FTYPE_MOSTLY_Q4_K_M = 15


def qft(job: Job) -> Step:
    """Straight from base and adapter, as `qft export --format gguf:q4_k_m --no-verify` does it."""
    import gguf
    import transformers.models.auto.tokenization_auto
    import transformers.models.encoder_decoder.configuration_encoder_decoder
    import transformers.models.llama.modeling_llama  # noqa: F401

    import qft.export.gguf_format  # noqa: F401
    from qft.export.delivery import export

    assert gguf

    def run() -> str:
        export(job["adapter"], job["out"], format="gguf:q4_k_m", base=job["base"], verify=False)
        return str(Path(job["out"]) / "model-q4_k_m.gguf")

    return run


def merge(job: Job) -> Step:
    """PEFT's documented way to one model."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run() -> str:
        model: Any = AutoModelForCausalLM.from_pretrained(job["base"])
        model = PeftModel.from_pretrained(model, job["adapter"]).merge_and_unload()
        model.save_pretrained(job["merged"])
        AutoTokenizer.from_pretrained(job["base"]).save_pretrained(job["merged"])
        return str(job["merged"])

    return run


def convert(job: Job) -> Step:
    """llama.cpp's own converter, to 16 bits.

    It recognises a tokenizer by a hash of what it cuts a text into, and cannot know one that was
    made up; it is told what it would find for the real one.
    """
    sys.path[:0] = [str(Path(job["sources"]) / "gguf-py"), job["sources"]]
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.configuration_llama  # noqa: F401
    from conversion import base, llama  # type: ignore[import-not-found]

    assert llama
    base.TextModel.get_vocab_base_pre = lambda model, tokenizer: "llama-bpe"
    sys.argv = ["convert_hf_to_gguf.py", job["merged"], "--outfile", job["f16"], "--outtype", "f16"]

    def run() -> str:
        convert_hf_to_gguf.main()
        return str(job["f16"])

    return run


def quantize(job: Job) -> Step:
    """llama.cpp's own quantizer."""
    import ctypes

    from llama_cpp import llama_cpp as library

    settings = library.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = LLAMA_FTYPE_MOSTLY_Q4_K_M, int(job["threads"])

    def run() -> str:
        failed = library.llama_model_quantize(
            job["f16"].encode(), job["quantized"].encode(), ctypes.byref(settings)
        )
        assert not failed
        return str(job["quantized"])

    return run


STEPS: dict[str, Callable[[Job], Step]] = {
    "qft": qft,
    "merge": merge,
    "convert": convert,
    "quantize": quantize,
}


def written_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Runs the step once and reports."""
    job = json.load(sys.stdin)
    import torch

    torch.set_num_threads(int(job["threads"]))
    step = STEPS[sys.argv[1]](job)
    gc.collect()
    known = set(sys.modules)
    began = reset_peak()
    imports = resident_bytes()
    cpu, wall = time.process_time(), time.monotonic()
    written = step()
    report = {
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "imports_bytes": imports,
        "peak_above_imports_bytes": peak_bytes() - imports,
        "peak_was_reset": began,
        "written_bytes": written_bytes(Path(written)),
        "late_imports": sorted(
            name for name in set(sys.modules) - known if name.partition(".")[0] in
            ("torch", "transformers", "peft", "gguf", "qft", "adapters")
        ),
        "versions": versions(),
    }  # fmt: skip
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
