"""Soft prompts: trained embeddings before the text's own, as such or through a small network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from adapters.peft_backed import PeftStrategy, peft_task_type, read_config, read_tensors
from qft.errors import AdapterError, RecipeError
from qft.lean.model_parts import head_names
from qft.strategy import Context, Needs

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_NETWORK_FILE = "reparametrisation.safetensors"  # what a training goes on with; PEFT needs it not


class SoftPrompt(PeftStrategy):
    """What prompt tuning and p-tuning share: virtual tokens that the model reads first."""

    length: int = Field(20, ge=1, description="virtual tokens")

    @property
    def tasks(self) -> frozenset[str]:
        """All but those that answer token by token: PEFT does not shift their answers."""
        return super().tasks - {"extract", "token"}

    @property
    def advice(self) -> str:
        """What to do instead of merging."""
        return "keep it as an adapter (plain PEFT opens it too), or train {name: lora}"

    def needs(self, skeleton: nn.Module) -> Needs:
        """A new head trains beside the prompt; the prompt takes the first positions."""
        return Needs(
            full_precision=tuple(head_names(skeleton)),
            extra_positions=self.length,
            extends_sequence=True,
        )

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes PEFT's folder, and beside it the small network, if there is one."""
        from safetensors.torch import save_file

        super().save(model, folder)
        state = {name: t.detach().cpu() for name, t in _encoder(model).state_dict().items()}
        if set(state) != {"embedding.weight"}:
            save_file(state, folder / _NETWORK_FILE)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the prompt and the head, exactly."""
        from safetensors.torch import load_file

        super().load(model, folder)
        if set(_encoder(model).state_dict()) == {"embedding.weight"}:
            return
        if not (folder / _NETWORK_FILE).is_file():
            raise AdapterError("The saved prompt has no small network to go on with.",
                               where=folder, fix="open it as {name: prompt}")  # fmt: skip
        _encoder(model).load_state_dict(load_file(folder / _NETWORK_FILE))


class Prompt(SoftPrompt):
    """Trained embeddings before the text's own: the fewest parameters there are."""

    name: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "Lester et al. 2021, https://arxiv.org/abs/2104.08691"

    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="begin with embeddings of words drawn at random, or with noise"
    )
    init_text: str | None = Field(None, description="begin with this text's embeddings")
    both_sides: bool = Field(
        False, description="encoder-decoders: a prompt for the decoder too, as PEFT's default is"
    )

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """PEFT's PromptTuningConfig for this model."""
        from peft import PromptTuningConfig

        random = self.init == "random" or next(model.parameters()).is_meta
        return PromptTuningConfig(
            **_sizes(model),
            task_type=peft_task_type(model),
            num_virtual_tokens=self.length,
            num_transformer_submodules=2 if self.both_sides and _has_decoder(model) else 1,
            prompt_tuning_init="RANDOM" if random else "SAMPLE_VOCAB",
        )

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes the model and puts the prompt before its embeddings."""
        import torch

        wrapped: Any = super().attach(model, context)
        weight = _encoder(wrapped).embedding.weight
        if self.init_text is not None and not weight.is_meta:
            ids = self._text_ids(context, weight.shape[0])
            with torch.no_grad():
                weight.copy_(wrapped.word_embeddings(ids.to(weight.device)))
        return wrapped  # type: ignore[no-any-return]

    def _text_ids(self, context: Context, count: int) -> Any:
        import torch

        if context.tokenize is None:
            raise RecipeError("A text to begin with needs the model's tokenizer.",
                              where="strategy.init_text",
                              fix="pass Context(tokenize=…) to prepare")  # fmt: skip
        ids = context.tokenize(str(self.init_text))
        if not ids:
            raise RecipeError("The text to begin with is empty.", where="strategy.init_text")
        return torch.tensor((ids * (count // len(ids) + 1))[:count])

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """A PEFT folder of prompt tuning, or of p-tuning: saved, both are embeddings."""
        values = read_config(folder, "PROMPT_TUNING") or read_config(folder, "P_TUNING")
        if values is None:
            return None
        both = values.get("num_transformer_submodules") == 2
        return cls(length=values["num_virtual_tokens"], init="random", both_sides=both)


class PTuning(SoftPrompt):
    """A soft prompt trained through a small network, which is folded away when saving."""

    name: ClassVar[str] = "p-tuning"
    paper: ClassVar[str] = "Liu et al. 2021, https://arxiv.org/abs/2103.10385"

    hidden: int = Field(128, ge=1, description="width of the small network")
    kind: Literal["mlp", "lstm"] = Field("mlp", description="its form")

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """PEFT's PromptEncoderConfig for this model."""
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            **_sizes(model),
            task_type=peft_task_type(model),
            num_virtual_tokens=self.length,
            num_transformer_submodules=1,
            encoder_hidden_size=self.hidden,
            encoder_reparameterization_type=self.kind.upper(),  # type: ignore[arg-type]
        )

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads prompt, network and head, to go on with the training."""
        self.require_same(model, read_tensors(folder), folder)
        super().load(model, folder)


def _encoder(model: Any) -> Any:
    return model.prompt_encoder["default"]


def _sizes(model: Any) -> dict[str, int]:
    """What PEFT would look for in the config, by names that not every family gives it.

    A prompt is as wide as the embeddings, which ALBERT and ELECTRA widen only behind them.
    """
    named = {
        "num_layers": getattr(model.config, "num_hidden_layers", None),
        "num_attention_heads": getattr(model.config, "num_attention_heads", None),
        "token_dim": model.get_input_embeddings().weight.shape[1],
    }
    return {key: size for key, size in named.items() if isinstance(size, int)}


def _has_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
