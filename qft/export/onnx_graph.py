"""A model as an ONNX graph: traced by torch.onnx, quantized by onnxruntime, and neither heard."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft.errors import ModelError, first_line
from qft.onnx_files import FILE

OPSET = 18  # the lowest that the exporter writes unconverted: the most runtimes know it
_ONE_FILE_BYTES = 2**31 - 2**26  # protobuf ends at 2 GiB; the graph itself needs some of it
_UNQUANTIZED = "float32.onnx"
_ROWS, _LENGTH = 2, 7  # of the traced batch; both stay open in the graph


def write_float32(
    model: nn.Module, folder: Path, inputs: Sequence[str], outputs: Sequence[str], name: str = FILE
) -> None:
    """Traces an encoder and writes its graph, weights in float32.

    Args:
        model: in eval mode, on the CPU.
        folder: that is being made.
        inputs: of its ``forward``, int64 ``[batch, sequence]`` each, both open.
        outputs: the fields of its answer, in their order.
        name: of the file; weights that one file cannot hold lie in ``<name>.data``.

    Raises:
        ModelError: the exporter cannot follow the model.
    """
    told = model.forward

    def forward(
        input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = {"token_type_ids": token_type_ids} if token_type_ids is not None else {}
        answer = told(input_ids=input_ids, attention_mask=attention_mask, **given)
        return tuple(getattr(answer, output) for output in outputs)

    batch = _sample(int(getattr(model.config, "vocab_size", 8)), inputs)  # type: ignore[union-attr]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    model.forward = forward  # type: ignore[method-assign,assignment]
    try:
        with _explained(model), _unheard(), torch.no_grad():
            program: Any = torch.onnx.export(
                model, (), kwargs=batch, dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes=dict.fromkeys(inputs, axes), input_names=list(inputs),
                output_names=list(outputs),
            )  # fmt: skip
            _forget_traces(program.model)
            program.save(folder / name, external_data=_bytes(model) > _ONE_FILE_BYTES)
    finally:
        model.forward = told  # type: ignore[method-assign]


def write_int8(
    model: nn.Module, folder: Path, inputs: Sequence[str], outputs: Sequence[str], *, head: bool
) -> None:
    """The same with its linear layers' matrices, a scale a column, and its embeddings in 8 bits.

    Activations are quantized while the model runs, each by the range it has in the batch. The
    matrices' numbers use 7 of the 8 bits: sums of wider products saturate on processors without
    VNNI, and what was verified here has to be right there too.

    Args:
        head: whether the last linear layer is the task's head, which stays in float32.

    Raises:
        ModelError: the exporter cannot follow the model.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    write_float32(model, folder, inputs, outputs, _UNQUANTIZED)
    kept = []
    if head:
        kept = last_products(onnx.load(folder / _UNQUANTIZED, load_external_data=False).graph)
    with _explained(model), _unheard():
        quantize_dynamic(
            folder / _UNQUANTIZED, folder / FILE, op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=kept, use_external_data_format=_bytes(model) > _ONE_FILE_BYTES,
        )  # fmt: skip
    for path in folder.glob(f"{_UNQUANTIZED}*"):
        path.unlink()


def last_products(graph: Any) -> list[str]:
    """Names of the matrix products that no other one follows on the way to an output."""
    makers = {made: node for node in graph.node for made in node.output}
    waiting, found = [output.name for output in graph.output], []
    while waiting:
        node = makers.get(waiting.pop())
        if node is None:
            continue
        if node.op_type in ("MatMul", "Gemm"):
            found += [node.name, f"{node.name}_MatMul"]  # what onnxruntime makes of a Gemm
        else:
            waiting += node.input
    return sorted(set(found))


def _sample(vocabulary: int, inputs: Sequence[str]) -> dict[str, Tensor]:
    """A batch with padding, so that the graph keeps what masks it."""
    ids = torch.arange(_ROWS * _LENGTH).reshape(_ROWS, _LENGTH) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, _LENGTH // 2 :] = 0
    full = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: full[name] for name in inputs}


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * 4 for tensor in model.state_dict().values())


def _forget_traces(model: Any) -> None:
    """Takes out where each operator comes from: lines of code and paths of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.initializers.values(), *model.graph.inputs):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


@contextlib.contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Makes one error of what the exporters raise: kinds of their own, and long ones."""
    try:
        yield
    except OSError:  # the disk's, which is explained elsewhere
        raise
    except Exception as error:
        raise ModelError(
            "This model cannot be exported to ONNX.",
            where=type(model).__name__,
            found=f"{type(error).__name__}: {first_line(error.__cause__ or error)}",
            fix="another format",
        ) from error


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keeps the exporter's notices to itself; its errors come through."""
    root, former = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)
        root.handlers[:] = handlers  # logging.warning() of a library puts one there
