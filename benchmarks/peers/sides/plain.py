"""transformers' Trainer and PEFT, as their documentation has it, and with its best settings.

Options: `micro_batch` (rows a forward pass), `attention`, `adapter_dtype` (float32 is PEFT's
default), `kbit_preparation` (PEFT's documented step for 4-bit models; the default where there are
4 bits), `arguments` (of TrainingArguments).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.channel import Channel


def main() -> None:
    """Trains one job."""
    channel = Channel()
    job = channel.receive()
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from benchmarks.peers.blocks import Blocks

    if job["quantize"] == "nf4":
        import bitsandbytes  # noqa: F401
    channel.imported()
    options: dict[str, Any] = job["options"]
    transformers.set_seed(job["seed"])
    loading: dict[str, Any] = {"dtype": torch.bfloat16}
    if "attention" in options:
        loading["attn_implementation"] = options["attention"]
    if job["quantize"] == "nf4":
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], **loading)
    if job["quantize"] == "nf4" and options.get("kbit_preparation", True):
        model = prepare_model_for_kbit_training(model)
    config = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    fp32 = options.get("adapter_dtype", "float32") == "float32"
    model = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    micro_batch = options.get("micro_batch", job["batch"])
    arguments = transformers.TrainingArguments(
        output_dir=job["output"],
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job["batch"] // micro_batch,
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",  # the same samples in the same step as all sides
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options.get("arguments", {}),
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=read_tokens(job),  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[Blocks(channel, job["steps_a_block"])],
    )
    trainer.train()


def read_tokens(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The job's samples, in the order of training."""
    lines = Path(job["tokens"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]


if __name__ == "__main__":
    main()
