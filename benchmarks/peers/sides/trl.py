"""TRL's SFTTrainer, as its documentation has it, and with its best settings.

Options: `micro_batch`, `attention`, `arguments` (of SFTConfig).
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.channel import Channel


def main() -> None:
    """Trains one job."""
    channel = Channel()
    job = channel.receive()
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

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
    config = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**sft_arguments(job)),
        train_dataset=datasets.Dataset.from_list(completions(job)),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=config,
        callbacks=[Blocks(channel, job["steps_a_block"])],
    )
    trainer.train()


def sft_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Of SFTConfig: the job's, and the options'."""
    options: dict[str, Any] = job["options"]
    micro_batch = options.get("micro_batch", job["batch"])
    return {
        "output_dir": job["output"],
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job["batch"] // micro_batch,
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "max_length": job["max_length"],
        "completion_only_loss": True,  # tokens with a mask are not taken for prompt and completion
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options.get("arguments", {}),
    }


def completions(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The job's samples as TRL takes tokens: a mask says which belong to the completion."""
    from benchmarks.peers.sides.plain import read_tokens

    return [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label != -100) for label in row["labels"]],
        }
        for row in read_tokens(job)
    ]


if __name__ == "__main__":
    main()
