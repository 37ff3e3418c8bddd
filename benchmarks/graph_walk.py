"""Autograd's backward pass in Python, node by node, for tensors without memory: PyTorch's engine asks for a driver."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add the gradients of the leaves that ``outputs`` depend on: autograd's algorithm, in this thread."""
    roots = [(output.grad_fn, output.output_nr, grad) for output, grad in zip(outputs, grads, strict=True)]
    waiting = edges_into_nodes([node for node, _, _ in roots])
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    for root, index, grad in roots:
        accumulate(root, arrived[root], index, grad)
    ready: list[Any] = [node for node in dict.fromkeys(node for node, _, _ in roots) if not waiting[node]]
    while ready:
        node = ready.pop()
        inputs = arrived.pop(node, {})
        for (following, index), found in zip(node.next_functions, gradients(node, inputs), strict=False):
            if following is None:
                continue
            if found is not None:
                accumulate(following, arrived[following], index, found)
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def edges_into_nodes(roots: Sequence[Any]) -> dict[Any, int]:
    """For each node of the graph, how many gradients it waits for."""
    waiting: dict[Any, int] = defaultdict(int)
    seen, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            following = [each for each, _ in node.next_functions if each is not None]
            stack.extend(following)
            for each in following:
                waiting[each] += 1
    return waiting


def gradients(node: Any, inputs: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """What a node passes on; a leaf keeps its gradient."""
    if type(node).__name__ == "AccumulateGrad":
        if 0 in inputs:
            leaf = node.variable
            leaf.grad = inputs[0] if leaf.grad is None else leaf.grad + inputs[0]
        return ()
    if not inputs:
        return [None] * len(node.next_functions)
    metadata = node._input_metadata
    values = [inputs.get(index) for index in range(len(metadata))]
    if hasattr(node, "_forward_cls"):  # a `torch.autograd.Function`; missing gradients are zeros
        given = (zeros(each) if value is None else value for value, each in zip(values, metadata, strict=True))
        found = node.apply(*given)
    else:
        found = node(*values)
    return found if isinstance(found, (tuple, list)) else (found,)


def zeros(metadata: Any) -> Tensor:
    """A missing gradient."""
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)


def accumulate(node: Any, arrived: dict[int, Tensor], index: int, grad: Tensor) -> None:
    """Add a gradient to what has arrived at an input of a node, in that input's shape and dtype."""
    wanted = node._input_metadata[index]
    if grad.shape != wanted.shape:
        grad = grad.sum_to_size(wanted.shape)
    grad = grad.to(wanted.dtype)
    arrived[index] = arrived[index] + grad if index in arrived else grad
