"""qft as its users run it: a recipe, and `qft.train`.

Options: `recipe`, values that differ from the recipe's defaults.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.channel import Channel


def main() -> None:
    """Trains one job."""
    channel = Channel()
    job = channel.receive()
    import qft
    from benchmarks.peers.blocks import Blocks
    from qft.training import train

    if job["quantize"] == "nf4":
        import bitsandbytes  # noqa: F401
    channel.imported()
    recipe = qft.build_recipe(recipe_of(job))
    train(recipe, overwrite=True, callbacks=[Blocks(channel, job["steps_a_block"])])


def recipe_of(job: dict[str, Any]) -> dict[str, Any]:
    """The job as a recipe: what is not the job's own stays at its default."""
    values: dict[str, Any] = {
        "model": job["model"],
        "task": "instruct",
        "data": {"train": job["rows"]},
        "strategy": {"name": "lora", "rank": job["rank"], "alpha": job["alpha"]},
        "quantize": job["quantize"],
        "dtype": "bfloat16",
        "device": "cpu",
        "train": {
            "max_steps": job["steps"],
            "batch_size": job["batch"],
            "learning_rate": job["learning_rate"],
            "schedule": "constant",
            "warmup": 0,
            "max_length": job["max_length"],
            "log_every": 1,
            "seed": job["seed"],
        },
        "output": job["output"],
    }
    for key, value in job["options"].get("recipe", {}).items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


if __name__ == "__main__":
    main()
