"""Projection and prediction heads, each with the layers, biases, norms and first weights of its paper's code.

MoCo's, SwAV's and InstDisc's heads keep PyTorch's default initialisation of Linear, as their code does. SimCLR's and
BYOL's are drawn as TensorFlow's and Haiku's are.
"""

from torch import nn


def mlp_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MoCo v2's head: Linear, ReLU, Linear, with biases and without BatchNorm (arXiv:2003.04297)."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))


def batch_norm_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int, last_norm: bool, norm: bool = True
) -> nn.Sequential:
    """MoCo v3's projector and predictor: Linear layers without bias, BatchNorm and ReLU between them.

    Args:
        in_dim: Width of the input (B, in_dim).
        hidden_dim: Width between the layers (4096 in the paper).
        out_dim: Width of the output (B, out_dim) (256 in the paper).
        num_layers: Number of Linear layers (projector 2 for ResNet, 3 for ViT; predictor 2).
        last_norm: Whether a BatchNorm without scale and offset follows the last layer (the SimCLR design).
        norm: False leaves every BatchNorm out: the paper's ablation (table 3).
    """
    layers: list[nn.Module] = []
    for index in range(num_layers):
        last = index == num_layers - 1
        width = out_dim if last else hidden_dim
        layers.append(nn.Linear(in_dim if index == 0 else hidden_dim, width, bias=False))
        if not last:
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]
        elif last_norm and norm:
            layers.append(nn.BatchNorm1d(width, affine=False))
    return nn.Sequential(*layers)


def simclr_head(in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int) -> nn.Sequential:
    """SimCLR's head: as `batch_norm_mlp`, but the last BatchNorm has a scale; its offset stays 0.

    Weights are drawn from a normal of standard deviation 0.01.

    Args:
        in_dim: Width of the features (B, in_dim).
        hidden_dim: Width between the layers (the feature width in the paper).
        out_dim: Width of the embeddings (B, out_dim) (128).
        num_layers: 2 in SimCLR, 3 in SimCLR v2 (arXiv:2006.10029).
    """
    layers = batch_norm_mlp(in_dim, hidden_dim, out_dim, num_layers=num_layers, last_norm=False)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    scale_only = nn.BatchNorm1d(out_dim)
    scale_only.bias.requires_grad_(False)
    return layers.append(scale_only)


def byol_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """BYOL's projector and predictor: Linear with bias, BatchNorm, ReLU, Linear without (arXiv:2006.07733).

    Weights are drawn as Haiku's Linear draws them: from a normal of standard deviation 1 / sqrt(fan in), again where
    they lie more than two deviations out. Biases are zero.
    """
    first, last = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, out_dim, bias=False)
    for layer in (first, last):
        std = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True), last)


def swav_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """SwAV's projector: Linear, BatchNorm, ReLU, Linear, with biases (arXiv:2006.09882)."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim),
    )
