"""A convolutional network that reads handwritten digits (scikit-learn's 1797 pictures of 8x8), trained in seconds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.importers.model import Model

EPOCHS, TRAINED_ON = 20, 897


class DigitsCnn(nn.Module):
    """Dense and depthwise layers, a residual and batch norms."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.expand, self.expand_norm = nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.depthwise_norm = nn.BatchNorm2d(2 * width)
        self.project, self.project_norm = nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width)
        self.wide, self.wide_norm = (
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
        )
        self.last, self.last_norm = nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu6(self.expand_norm(self.expand(x)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project_norm(self.project(y))
        x = F.relu(self.wide_norm(self.wide(x)))
        x = F.relu(self.last_norm(self.last(x)))
        return self.head(x.mean((2, 3)))


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((pictures [N, 1, 8, 8], labels) to train on, the same to test on), drawn anew by ``seed``."""
    data = pytest.importorskip("sklearn.datasets", reason="its digits").load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAINED_ON], order[TRAINED_ON:]
    return (pictures[train], labels[train]), (pictures[test], labels[test])


def trained(seed: int, width: int = 32) -> tuple[Model, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The network as a model of kind "image", and the pictures and labels of :func:`digits`."""
    torch.manual_seed(seed)
    train, test = digits(seed)
    module = DigitsCnn(width)
    optimiser = torch.optim.AdamW(module.parameters(), lr=4e-3, weight_decay=1e-2)
    batches = TRAINED_ON // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, EPOCHS * batches)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED_ON)[: batches * 64].split(64):
            # Shifted by up to a pixel: the pictures are few.
            dx, dy = torch.randint(-1, 2, (2,)).tolist()
            x = train[0][rows].roll((dx, dy), (2, 3))
            loss = F.cross_entropy(module(x), train[1][rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    module.eval()
    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(module, (test[0][:2],), dynamic_shapes=shapes)
    return Model(exported, "image", {"image": {"size": 8}}), train, test


def accuracy(run, test: tuple[Tensor, Tensor]) -> float:
    """Per cent of the test pictures that are read right."""
    with torch.no_grad():
        output = run(test[0])
    output = output[0] if isinstance(output, tuple) else output
    return 100 * (output.argmax(-1) == test[1]).float().mean().item()
