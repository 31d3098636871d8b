"""An ONNX file as a model that answers as transformers' do, run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qft import models
from qft.errors import ModelError, RecipeError, first_line
from qft.onnx_files import read_graph

_KNOWN = ("input_ids", "attention_mask", "token_type_ids")
_ANSWERS = {
    ("logits",): "SequenceClassifierOutput",
    ("start_logits", "end_logits"): "QuestionAnsweringModelOutput",
    ("last_hidden_state",): "BaseModelOutput",
}


class OnnxModel(nn.Module):
    """An encoder within an onnxruntime session.

    Args:
        session: an open ``onnxruntime.InferenceSession``.
        config: transformers' config of the model.
        outputs: the fields of its answer that are asked for.
    """

    def __init__(self, session: Any, config: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.config, self._session, self._outputs = config, session, list(outputs)
        self._inputs = [entry.name for entry in session.get_inputs()]
        # what it computes on is asked of a model's parameters
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **unused: Any,
    ) -> Any:
        """The task's answer as transformers' class of it, in float32; without a loss.

        Args:
            input_ids: int64 ``[batch, length]``, any batch and length.
            attention_mask: 0 where there is padding; None is no padding.
            token_type_ids: None is the first text's throughout.
            unused: labels and the like.

        Raises:
            ModelError: onnxruntime cannot run the batch (it is longer than the model's positions).
        """
        from transformers import modeling_outputs

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = dict(zip(_KNOWN, (input_ids, attention_mask, token_type_ids), strict=True))
        arrays = {name: given[name].to("cpu", torch.int64).numpy() for name in self._inputs}
        try:
            found = self._session.run(self._outputs, arrays)
        except Exception as error:  # onnxruntime raises kinds of its own
            shape = f"{tuple(input_ids.shape)}: {first_line(error)}"
            raise ModelError("onnxruntime cannot run this batch.", found=shape) from error
        made = {name: torch.from_numpy(value).float()
                for name, value in zip(self._outputs, found, strict=True)}  # fmt: skip
        return getattr(modeling_outputs, _ANSWERS[tuple(self._outputs)])(**made)

    def generate(self, *arguments: Any, **settings: Any) -> NoReturn:
        """Raises RecipeError: an encoder does not write."""
        raise RecipeError("An encoder does not write: it reads a text and answers about it.",
                          fix="qft eval MODEL --data FILE")  # fmt: skip


def open_onnx(file: Path, task: str | None = None) -> OnnxModel:
    """Opens an ONNX file beside its config.json, in eval mode.

    Args:
        task: where config.json does not say it.

    Raises:
        ModelError: it is broken, not to be trusted, or no encoder.
    """
    read_graph(file)  # refuses what onnxruntime must not be given
    import onnxruntime

    values = models.read_config(file.parent)
    named = task or models.task_to_run(values)
    config = models.open_config(file.parent, models.ModelSpec(source=str(file), task=named))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ModelError("onnxruntime cannot open this file.", where=file,
                         found=first_line(error)) from error  # fmt: skip
    model = OnnxModel(session, config, _outputs(session, file))
    model.name_or_path = str(file)  # type: ignore[assignment]
    return model.eval()


def _outputs(session: Any, file: Path) -> tuple[str, ...]:
    """Which known answer the session gives."""
    inputs = [entry.name for entry in session.get_inputs()]
    given = [entry.name for entry in session.get_outputs()]
    for wanted in _ANSWERS:
        if set(wanted) <= set(given) and set(inputs) <= set(_KNOWN):
            return wanted
    raise ModelError(
        "This ONNX file is not an encoder that qft knows.", where=file,
        found=f"inputs {', '.join(inputs):.80}; outputs {', '.join(given):.80}",
        fix=f"inputs among {', '.join(_KNOWN)}; outputs logits, start_logits and end_logits, or "
        "last_hidden_state",
    )  # fmt: skip
