"""ONNX model folders: where the file is, and what it says of itself before anything runs it.

A file from elsewhere is untrusted. Its weights may lie in other files, which it names: only plain
names inside its own folder are followed. No library of custom operators is ever loaded, and a file
that needs one is refused by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qft.errors import ModelError, first_line
from qft.shards import inside

FILE = "model.onnx"
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}  # whose operators onnxruntime brings
_INT8 = ("INT8", "UINT8")


def require_libraries() -> None:
    """Refuses to go on without onnx, onnxscript and onnxruntime.

    Raises:
        ModelError: one of them is not installed; says how to install all.
    """
    import importlib.util

    names = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            "ONNX needs libraries that are not installed.",
            found=f"no {', no '.join(missing)}",
            fix="pip install 'qft-toolkit[onnx]'",
        )


def onnx_file(path: Path) -> Path | None:
    """The ONNX file a path names or, as a folder without other weights, holds; or None."""
    if path.suffix == ".onnx" and path.is_file():
        return path
    held = (path / FILE).is_file() and not any(path.glob("*.safetensors"))
    return path / FILE if held else None


def read_graph(file: Path) -> Any:
    """The file's ModelProto, without the weights that lie beside it, once it is found harmless.

    Raises:
        ModelError: it is broken, needs custom operators, or names weights outside its folder.
    """
    require_libraries()
    import onnx

    inside(file.parent, file.name)
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf raises kinds of its own
        found = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError("The ONNX file cannot be read.", where=file, found=found) from error
    if not model.graph.output:
        raise ModelError("The ONNX file holds no model.", where=file)
    strange = {entry.domain for entry in model.opset_import} - _DOMAINS - _own_domains(model)
    if strange:
        raise ModelError(
            "The ONNX file needs operators of another library, which qft does not load.",
            where=file,
            found=f"domain {min(strange)!r:.80}",
            fix="export it without custom operators",
        )
    for tensor in tensors_in(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                _require_beside(file, entry.value)
    return model


def _own_domains(model: Any) -> set[str]:
    """Of the functions that the file itself defines, by standard operators."""
    return {function.domain for function in model.functions}


def _require_beside(file: Path, name: str) -> None:
    if not inside(file.parent, name).is_file():
        raise ModelError("The ONNX file's weights are missing.", where=file.parent,
                         found=f"no {name[:80]}")  # fmt: skip


def tensors_in(model: Any) -> Iterator[Any]:
    """Every TensorProto of a model: weights, constants, those of inner graphs and functions."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _in_node(node)
    for training in model.training_info:
        yield from _in_graph(training.initialization)
        yield from _in_graph(training.algorithm)


def _in_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _in_node(node)


def _in_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for held in (*sparse, *attribute.sparse_tensors):
            yield from (held.values, held.indices)
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _in_graph(graph)


def weight_count(file: Path) -> int:
    """How many numbers the file's weights are.

    Raises:
        ModelError: see :func:`read_graph`.
    """
    return sum(math.prod(tensor.dims) for tensor in read_graph(file).graph.initializer)


def stored_kind(file: Path) -> str:
    """``int8`` where matrices are multiplied as integers, else the type of most bytes.

    Raises:
        ModelError: see :func:`read_graph`.
    """
    import onnx

    model = read_graph(file)
    if any(node.op_type in ("MatMulInteger", "DynamicQuantizeLinear") for node in model.graph.node):
        return "int8"
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        counts[names.get(tensor.data_type, "unknown")] += math.prod(tensor.dims)
    held = counts.most_common(1)[0][0] if counts else "FLOAT"
    if held in _INT8:
        return "int8"
    return {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}.get(held, held.lower())
