"""Unsloth's CPU backend, as its notebooks have it, and with its best settings.

Runs in an environment of its own (`benchmarks.peers.unsloth_environment`). Options:
`checkpointing` ("unsloth" is the default), `micro_batch`, `arguments` (of SFTConfig), `attention`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.channel import Channel


def main() -> None:
    """Trains one job."""
    channel = Channel()
    job = channel.receive()
    import datasets
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel  # before all else, as it asks

    from benchmarks.peers.blocks import Blocks
    from benchmarks.peers.sides.trl import completions, sft_arguments

    if job["quantize"] == "nf4":
        import bitsandbytes  # noqa: F401
    channel.imported()
    options: dict[str, Any] = job["options"]
    loading = {"attn_implementation": options["attention"]} if "attention" in options else {}
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"],
        max_seq_length=job["max_length"],
        load_in_4bit=job["quantize"] == "nf4",
        use_gradient_checkpointing=options.get("checkpointing", "unsloth"),
        **loading,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["rank"],
        lora_alpha=job["alpha"],
        target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ],
        use_gradient_checkpointing=options.get("checkpointing", "unsloth"),
        random_state=job["seed"],
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**sft_arguments(job)),
        train_dataset=datasets.Dataset.from_list(completions(job)),
        processing_class=tokenizer,
        callbacks=[Blocks(channel, job["steps_a_block"])],
    )
    trainer.train()


if __name__ == "__main__":
    main()
