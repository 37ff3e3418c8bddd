"""What evaluations ask of a GPU, on fake CUDA tensors: devices do not mix, no driver is needed, and waits are counted.

Values are those of the same code on CPU tensors, which other tests compare.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.evaluate.features import devices, extraction
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import features_key
from sslkit.evaluate.features.transforms import evaluation_transform, finished_on, training_transform
from sslkit.evaluate.probes import linear, sharded_bank
from sslkit.evaluate.probes.knn import KnnProtocol
from sslkit.evaluate.probes.linear import LinearProtocol, linear_accuracy
from sslkit.evaluate.probes.sharded_bank import Shard, predict_by_shards

PREPROCESSING = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.1)}


def load_fake_cuda() -> Any:
    file = Path(__file__).parents[2] / "benchmarks" / "fake_cuda.py"
    spec = importlib.util.spec_from_file_location("fake_cuda", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(file.parent))  # for the modules beside it
        spec.loader.exec_module(module)
    return module


fake_cuda = load_fake_cuda()


class Counting(fake_cuda.Counting):  # type: ignore[name-defined, misc]
    """Every value that is read is one or True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            if args[0].is_cuda:
                self.counts.waits[f"read at {fake_cuda.site()}"] += 1
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def gpu() -> Iterator[Any]:
    with fake_cuda.fake_gpu(1) as mode, mode:
        yield mode


def waits(counting: Counting) -> int:
    return sum(counting.counts.waits.values())


@pytest.mark.parametrize("protocol", [KnnProtocol(20), KnnProtocol(200, centre=True)])
def test_knn_waits_for_its_result_only(protocol: KnnProtocol, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks there are."""
    monkeypatch.setattr("sslkit.evaluate.probes.exact_search.DEVICE_BLOCK_ELEMENTS", 2**18)
    shards = [
        Shard(torch.empty(rows, 64, device=fake_cuda.GPU), torch.ones(rows, dtype=torch.bool), fake_cuda.GPU)
        for rows in (500, 3000)
    ]
    monkeypatch.setattr(Shard, "kept", lambda self: (self.features, torch.arange(len(self.features))))
    monkeypatch.setattr(sharded_bank, "count_of", lambda _readable: 3000)
    labels = torch.zeros(3000, dtype=torch.long)
    with Counting() as counting:
        predicted, rows = predict_by_shards(*shards, labels, 10, protocol, most=6)
    assert (predicted.shape, rows.shape) == ((500,), (500, protocol.k))
    assert waits(counting) == 2, counting.counts.waits  # classes and rows


def test_extraction_waits_for_no_batch(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    found = {}
    for batches in (2, 5):
        model = timm.create_model("test_resnet", num_classes=0)
        fake_cuda.move_to_gpu(model, gpu, torch.channels_last)
        monkeypatch.setattr(model, "to", lambda _device: None)  # is there; fake parameters cannot be moved
        pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        loader = [(pixels, torch.arange(4))] * batches
        monkeypatch.setattr(extraction, "image_loader", lambda *_args, loader=loader, **_options: (loader, 0))
        monkeypatch.setattr(extraction, "fingerprint", lambda _module: "")
        kinds = Counter[torch.dtype]()
        model.conv1[0].register_forward_hook(lambda _m, _i, output, kinds=kinds: kinds.update([output.dtype]))
        with Counting() as counting:
            features = extraction.extract_features(
                model, source.subset(range(4 * batches)), evaluation_transform(PREPROCESSING), device=fake_cuda.GPU
            )
        assert features.is_cuda
        assert (features.shape[0], features.dtype) == (4 * batches, torch.float32)
        assert kinds == {torch.bfloat16: batches}
        found[batches] = waits(counting)
    assert found == {2: 0, 5: 0}


def test_a_linear_classifier_waits_once_or_twice_an_epoch(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def classifier(*_arguments: Any) -> nn.Linear:
        made = nn.Linear(8, 5, device=fake_cuda.GPU)
        made.to = lambda _device: made  # type: ignore[method-assign, assignment, misc, return-value]
        return made

    monkeypatch.setattr(linear, "count_classes", lambda *_labels: 5)
    monkeypatch.setattr(linear, "_initial_classifier", classifier)
    found = []
    for epochs in (1, 4):
        protocol = LinearProtocol("moco_v3", epochs, 16, 0.1, "cosine")
        features, labels = torch.zeros(160, 8), torch.zeros(160, dtype=torch.long)
        with Counting() as counting:
            linear_accuracy(features, labels, torch.zeros(40, 8), torch.zeros(40, dtype=torch.long), protocol)
        found.append(waits(counting))
    assert found[1] - found[0] <= 3 * 3, found  # in 3 epochs of 10 steps: order, weights, answers


def test_images_are_sent_as_bytes_and_normalised_to_the_same_bits() -> None:
    images = [Image.fromarray(torch.randint(256, (50, 40, 3), dtype=torch.uint8).numpy()) for _ in range(3)]
    for transform in (evaluation_transform({**PREPROCESSING, "crop_pct": 0.9}), training_transform(PREPROCESSING)):
        sent, finish = finished_on(torch.device("meta"), transform)
        # A meta tensor has no values: the same steps on the CPU.
        finish.mean, finish.std = (torch.tensor(PREPROCESSING[key]).view(-1, 1, 1) for key in ("mean", "std"))  # type: ignore[attr-defined, arg-type]
        for image in images:
            torch.manual_seed(0)
            expected = transform(image)
            torch.manual_seed(0)
            assert (one := sent(image)).dtype == torch.uint8
            if "Random" not in str(transform):
                assert torch.equal(finish(one[None])[0], expected)


def test_other_transforms_are_left_as_they_are() -> None:
    channels = evaluation_transform({**PREPROCESSING, "input_size": (2, 32, 32), "mean": (0.3,) * 2, "std": (0.2,) * 2})
    for device, transform in (("meta", channels), ("cpu", evaluation_transform(PREPROCESSING))):
        sent, finish = finished_on(torch.device(device), transform)
        assert sent is transform
        assert finish(pixels := torch.zeros(1)) is pixels


def test_the_key_of_stored_features_holds_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    encoder = Encoder(nn.Linear(2, 2), PREPROCESSING, "linear", "linear")
    arguments = encoder, source, "transform", "output"
    in_float32 = features_key(*arguments)
    monkeypatch.setattr("sslkit.evaluate.features.readouts.feature_dtype", lambda _device: torch.bfloat16)
    assert features_key(*arguments) != in_float32


def test_a_gpu_that_is_full_keeps_features_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1000)
    monkeypatch.setattr(devices, "free_bytes", lambda _device: 2 * tensor.nbytes)
    assert devices.move_if_it_fits(tensor, torch.device("meta")).device.type == "meta"
    monkeypatch.setattr(devices, "free_bytes", lambda _device: 2 * tensor.nbytes - 1)
    assert devices.move_if_it_fits(tensor, torch.device("meta")) is tensor


def test_float32_products_are_exact_for_a_while() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with devices.exact_products():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_download_is_the_tensor() -> None:
    values: Tensor = torch.arange(3.0)
    assert torch.equal(devices.Download(values).wait(), values)
