"""Count what a training step asks of a GPU, without one: kernel launches, waits of the host, and collectives.

    python benchmarks/fake_cuda.py mocov2_r50 mocov3_vitb simclr_r50 [--processes 8] [--set KEY=VALUE ...] [--sites]

The real step of a recipe runs on fake CUDA tensors: PyTorch computes shapes, dtypes and devices as on a card, without
memory or a driver. What is counted:

- launches: operators that compute on the GPU. Views and allocations are none; an operator on a list of tensors is one.
- waits: the host reads a value from the GPU, needs a shape that depends on values, or copies memory that is not pinned.
- collectives: calls to the process group, which is a fake one of ``--processes``.

Kernels are not compiled or run: an operator may launch more than one. PyTorch's own engine needs a driver for the
backward pass of CUDA tensors, so the graph is walked here, node by node.
"""

import argparse
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from graph_walk import backward
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.data.augment.device_plan import plan_views
from sslkit.data.augment.parameters import draw_params
from sslkit.data.batch import Batch
from sslkit.data.sources.image_source import ImageSource
from sslkit.engine.optim import make_optimizer
from sslkit.engine.runtime import precision
from sslkit.engine.runtime.precision import resolve_precision
from sslkit.engine.setup import build_method, lag_of
from sslkit.engine.state import RecoveryState, TrainingState
from sslkit.engine.step import finish_step, guard_of, start_step
from sslkit.methods import BatchInfo, Progress
from sslkit.recipe.resolve import Recipe, load_recipe

GPU = torch.device("cuda", 0)
EPOCH_STEPS = 100
IMAGE = (375, 500)  # height and width that crops are drawn for
aten = torch.ops.aten
# Operators that give memory a shape, or allocate it, and launch nothing.
NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "lift_fresh", "alias", "device"),
}
SHAPE_FROM_VALUES = {"nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount"}


def empty_statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Two numbers for each channel, in float32 or wider."""
    size, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)


# PyTorch has no shapes for these.
SYNCHRONISED_BATCH_NORM: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": empty_statistics,
    "batch_norm_gather_stats_with_counts": empty_statistics,
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, *_: (*empty_statistics(grad), *empty_statistics(grad)),
    "batch_norm_backward_elemt": lambda grad, *_: torch.empty_like(grad),
}


@dataclass
class Counts:
    """What a step asked for. Sites are ``file:line function``, of the innermost line of sslkit."""

    launches: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    sent: float = 0.0  # bytes that this process sends in the collectives

    @property
    def syncs(self) -> int:
        """Number of times that the host waits."""
        return sum(self.waits.values())


class Counting(TorchDispatchMode):
    """Counts operators, and answers those that need the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" or func.namespace == "_c10d_functional":
            self.counts.collectives[f"{name} at {site()}"] += 1
            self.counts.sent += bytes_sent(name, args)
        on_gpu = any(each.is_cuda for each in tensors_in((args, kwargs)))
        if name == "_local_scalar_dense" and on_gpu:
            self.counts.waits[f"{name} at {site()}"] += 1
            return one_like(args[0])
        if name == "is_pinned":
            return True
        if name == "_pin_memory":
            return args[0]
        if name.startswith("_fused_"):  # updates in place; PyTorch has no shapes for it
            self.counts.launches += 1
            self.counts.operators[name] += 1
            return None
        if name in SYNCHRONISED_BATCH_NORM:
            self.counts.launches += 1
            self.counts.operators[name] += 1
            return SYNCHRONISED_BATCH_NORM[name](*args)
        if on_gpu and self._depends_on_values(name, args):
            self.counts.waits[f"{name} at {site()}"] += 1
        out = func(*args, **kwargs)
        if self._is_copy_of_devices(name, args, out):
            self._count_copy(name, args, kwargs, out)
        elif (on_gpu or any(each.is_cuda for each in tensors_in(out))) and not is_view(func, name):
            self.counts.launches += 1
            self.counts.operators[name] += 1
        return out

    def _depends_on_values(self, name: str, args: Any) -> bool:
        if name in SHAPE_FROM_VALUES:
            return True
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return False
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])

    def _is_copy_of_devices(self, name: str, args: Any, out: Any) -> bool:
        if name == "copy_":
            return bool(args[0].device != args[1].device)
        return name == "_to_copy" and bool(args[0].device != out.device)

    def _count_copy(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        nonblocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if out.is_cuda:
            self.counts.uploads += 1
        if not nonblocking:
            self.counts.waits[f"{'upload' if out.is_cuda else 'download'} at {site()}"] += 1


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def bytes_sent(name: str, args: Any) -> float:
    """Bytes that a process sends in a collective: an all-reduce and an all-gather as rings, an exchange directly."""
    world = dist.get_world_size()
    given = args[0] if name.startswith(("allreduce", "broadcast")) else args[1]
    size = sum(each.numel() * each.element_size() for each in tensors_in(given))
    if name.startswith("allreduce"):
        return 2 * (world - 1) / world * size
    return float((world - 1) * size) if "gather" in name else (world - 1) / world * size


def is_view(func: Any, name: str) -> bool:
    """Whether an operator launches nothing."""
    aliases = [value.alias_info for value in func._schema.returns]
    return name in NO_LAUNCH or any(alias and not alias.is_write for alias in aliases)


def one_like(tensor: Tensor) -> Any:
    """A plausible value for an element of a tensor."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def site() -> str:
    """Where sslkit called: the innermost frame of it."""
    for frame in reversed(traceback.extract_stack()):
        if "/sslkit/" in frame.filename:
            return f"{frame.filename.split('/sslkit/')[-1]}:{frame.lineno} {frame.name}"
    return "elsewhere"


class FakeGpuMode(FakeTensorMode):
    """Never asks for a driver, although `torch.cuda.is_available` is made to say that there is a GPU."""

    avoid_device_init = True


@contextmanager
def fake_gpu(processes: int) -> Iterator[FakeTensorMode]:
    """A process group of ``processes``, of which this is the first, and a mode in which CUDA tensors are fake."""

    def engine(tensor: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            backward([tensor], [torch.ones_like(tensor) if gradient is None else gradient])

    def engine_of_many(tensors: Any, grads: Any = None, *_: Any, **__: Any) -> None:
        several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        with torch.no_grad():
            backward(several, [torch.ones_like(each) for each in several] if grads is None else list(grads))

    with ExitStack() as stack:
        if processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", engine))
        stack.enter_context(mock.patch.object(torch.autograd, "backward", engine_of_many))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", return_value=1))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        stack.enter_context(mock.patch.object(torch.cuda, "Event"))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_name", return_value="GPU"))
        stack.enter_context(mock.patch.object(precision, "gpu_has_bf16", return_value=True))
        stack.enter_context(mock.patch.object(torch.cuda, "manual_seed"))
        # PyTorch takes lists of plain tensors only.
        stack.enter_context(mock.patch.object(clip_grad, "_has_foreach_support", return_value=True))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", to_list))
        yield FakeGpuMode(allow_non_fake_inputs=True)


def to_list(tensor: Tensor) -> Any:
    """`Tensor.tolist` of a fake tensor: one wait, plausible values."""
    value = tensor.flatten()[0].item() if tensor.numel() else 0.0
    return np.full(tuple(tensor.shape), value).tolist()


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An Accelerator that believes in the GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["device"] = GPU
    return Accelerator(mixed_precision=recipe.train.precision)


def move_to_gpu(module: nn.Module, mode: FakeTensorMode, memory_format: torch.memory_format) -> None:
    """Replace all parameters and buffers by fake ones on the GPU."""
    moved: dict[Tensor, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if tensor not in moved:
            fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
            channels_last = fake.ndim == 4 and memory_format is torch.channels_last
            fake = fake.to(GPU, memory_format=torch.channels_last if channels_last else torch.preserve_format)
            is_param = isinstance(tensor, nn.Parameter)
            moved[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_param else fake
        return moved[tensor]

    with mode:
        for child in module.modules():
            tables: list[dict[str, Any]] = [child._parameters, child._buffers]
            for held in tables:
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = move(tensor)


def fake_batch(recipe: Recipe, batch_size: int) -> Batch:
    """The views of a batch, in pinned memory; if the GPU makes them, crops and a plan of parameters really drawn."""
    policies = recipe.views.view_policies()
    views = [torch.zeros(batch_size, each.size, each.size, 3, dtype=torch.uint8) for each in policies]
    batch = Batch(views, torch.arange(batch_size))
    if recipe.views.device == "cpu":
        return batch
    params = [
        np.stack([draw_params(each, (0, 0, sample, view), IMAGE).as_row() for sample in range(batch_size)])
        for view, each in enumerate(policies)
    ]
    with unset_fake_temporarily():  # values decide about steps
        plan = plan_views(params, policies, [each.size for each in policies])
    return replace(batch, plan=replace(plan, packed=torch.zeros_like(plan.packed)))


def count_step(recipe: Recipe, processes: int = 1) -> Counts:
    """Count what the third step of a recipe asks for on one of ``processes`` GPUs, with nothing due to be logged."""
    with fake_gpu(processes) as mode:
        recipe = resolve_precision(recipe)
        torch.manual_seed(0)
        method = build_method(recipe, EPOCH_STEPS * recipe.train.batch_size)
        method.synchronise_batch_norm(GPU)
        move_to_gpu(method, mode, torch.contiguous_format if recipe.train.shard else torch.channels_last)
        accelerator = make_accelerator(recipe)
        method.train()
        with mode:
            wrapped = accelerator.prepare_model(method, device_placement=False, evaluation_mode=True)  # without DDP
            optimizer = accelerator.prepare_optimizer(make_optimizer(recipe, method), device_placement=False)
            recovery = RecoveryState()
            source: ImageSource = mock.Mock()
            state = TrainingState(recipe, accelerator, source, method, wrapped, optimizer, EPOCH_STEPS, 0, recovery)
            state.lag = lag_of(recipe, GPU, optimizer.optimizer)
            guard = guard_of(state)
            for _ in range(3):  # the first make the optimizer's state, and learn what buffers hold
                batch = fake_batch(recipe, recipe.train.batch_size // processes)
                counting = Counting()
                with counting:
                    started = start_step(state, batch, guard, lambda: (False, False, False))
                    if not state.lag:
                        finish_step(state, guard, started)
        AcceleratorState._reset_state(reset_partial_state=True)
    return counting.counts


def count_passes(recipe: Recipe, processes: int = 1) -> Counts:
    """Count the bare passes of a step: forward and backward of the undivided batch, and nothing else."""
    with fake_gpu(processes) as mode:
        recipe = resolve_precision(recipe)
        method = build_method(recipe, EPOCH_STEPS * recipe.train.batch_size).train()
        method.bn_groups, method.shuffle_keys = 1, False
        move_to_gpu(method, mode, torch.channels_last)
        accelerator = make_accelerator(recipe)
        with mode:
            images = recipe.train.batch_size // processes
            views = [torch.zeros(images, 3, each.size, each.size, device=GPU) for each in recipe.views.view_policies()]
            info = BatchInfo(torch.arange(images, device=GPU))
            for _ in range(2):
                counting = Counting()
                with counting:
                    with accelerator.autocast():
                        step = method(views, info, Progress(0, EPOCH_STEPS))
                    step.loss.backward()
        AcceleratorState._reset_state(reset_partial_state=True)
    return counting.counts


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--set", dest="stated", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sites", action="store_true", help="where the host waits, and where collectives are called")
    words = parser.parse_args()
    print("| recipe | waits | launches | of the bare passes | uploads | collectives |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in words.recipes:
        recipe = load_recipe(name, ["data.path=builtin:fashion_mnist", *words.stated])
        counts, bare = count_step(recipe, words.processes), count_passes(recipe, words.processes)
        total = sum(counts.collectives.values())
        print(f"| {name} | {counts.syncs} | {counts.launches} | {bare.launches} | {counts.uploads} | {total} |")
        if words.sites:
            for each in (counts.waits, counts.collectives):
                for where, times in each.most_common():
                    print(f"    {times:5} {where}")
            print("   ", counts.operators.most_common(30))


if __name__ == "__main__":
    main()
