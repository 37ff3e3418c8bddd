"""MoCo in your own training loop, with teacher, queue, loss and views from sslkit and without its engine."""

import timm
import torch
from torch import nn
from torch.nn.functional import normalize

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.parts.backbone import feature_dim
from sslkit.parts.heads import mlp_head
from sslkit.parts.losses import info_nce_with_queue
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.queue import KeyQueue


def pretrain(backbone: nn.Module, *, steps: int, batch_size: int = 64, lr: float = 1e-3) -> list[float]:
    """Train ``backbone``, (B, 3, 28, 28) to (B, D), in place. Returns the loss of each step in nats."""
    images = open_source(DataConfig(path="builtin:fashion_mnist"))
    config = ViewsConfig.of_policy("small_gray", size=28, crop_scale=(0.8, 1.0))
    views = ViewPipeline(config, seed=0)

    student = nn.Sequential(backbone, mlp_head(feature_dim(backbone, config.size), hidden_dim=256, out_dim=64))
    teacher, queue = MomentumTeacher(student), KeyQueue(size=1024, dim=64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        epoch, first = divmod(step * batch_size, len(images))
        samples = [(first + place) % len(images) for place in range(batch_size)]
        cut = [views(images.read(sample), epoch, sample) for sample in samples]
        pixels = (torch.stack([torch.from_numpy(view) for view in same]) for same in zip(*cut, strict=True))
        one, other = (normalise(batch, config.mean, config.std) for batch in pixels)

        query, key = normalize(student(one), dim=1), normalize(teacher(other), dim=1)
        loss, _ = info_nce_with_queue(query, key, queue.keys, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student, momentum=0.99)
        queue.push(key)  # after the loss, so that no key is its own negative
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    encoder = timm.create_model("test_mambaout", num_classes=0)
    curve = pretrain(encoder, steps=150)
    print(f"loss {curve[20]:.2f} when the queue has filled with real keys, {curve[-1]:.2f} after {len(curve)} steps")
