"""The text head: a projection of the pooled feature whose cosines to the class texts are logits.

It is trained beside the vision head, scores classes for free, and is saved on its own: `projection.*`, `Z`, `centre`,
`temperature`. Shapes: B batch, N images, C classes, F features, D dimensions of the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tes.objectives.base import soft_cross_entropy


class TextHead(nn.Module):
    """t = normalize(h(f)) Zᵀ / τ with h: Linear(F, F) - BatchNorm - ReLU - Linear(F, D), and Z frozen.

    Args:
        num_features: F.
        class_text_CD: Z, a row per class; brought to norm 1.
        temperature: τ.
        seed: Draws h's initial weights (PyTorch's own initialisation); the global generator is left as it was, so that
            an arm with h draws the same order and augmentation as one without.
    """

    def __init__(self, num_features: int, class_text_CD: Tensor, temperature: float, seed: int = 0) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("class_text_CD", F.normalize(class_text_CD.float(), dim=1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = nn.Sequential(
                nn.Linear(num_features, num_features),
                nn.BatchNorm1d(num_features),
                nn.ReLU(),
                nn.Linear(num_features, class_text_CD.shape[1]),
            )

    def forward(self, features_BF: Tensor) -> Tensor:
        """Return text logits (B, C)."""
        u_BD = F.normalize(self.projection(features_BF), dim=1)
        return u_BD @ self.class_text_CD.T / self.temperature

    def settle_norm(self, features_NF: Tensor) -> None:
        """Set the batch norm's statistics to those of the images that h was fitted to, and go to eval mode."""
        norm = self.projection[1]
        momentum, norm.momentum = norm.momentum, 1.0
        self.projection.train()
        with torch.no_grad():
            self.projection(features_NF)
        norm.momentum = momentum
        self.eval()

    def tensors(self, centre_D: Tensor | None) -> dict[str, Tensor]:
        """Return what is saved; `centre_D` is the mean row that was subtracted from Z, for rows that come later."""
        saved = {f"projection.{name}": tensor for name, tensor in self.projection.state_dict().items()}
        saved |= {"Z": self.class_text_CD, "temperature": torch.tensor(float(self.temperature))}
        return saved if centre_D is None else saved | {"centre": centre_D}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], num_features: int) -> TextHead:
        """Rebuild a saved head.

        Raises:
            KeyError, RuntimeError: A tensor is missing or of another shape.
        """
        head = TextHead(num_features, tensors["Z"], float(tensors["temperature"]))
        prefix = "projection."
        head.projection.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        return head.eval()


def fit_text_head(
    features_NF: Tensor,
    target_NC: Tensor,
    class_text_CD: Tensor,
    *,
    temperature: float,
    fit_steps: int,
    fit_penalty: float,
    seed: int,
    weight_N: Tensor | None = None,
) -> TextHead:
    """Return a head whose h minimises CE(t, y) on features that do not move, in eval mode, on their device.

    `weight_N` multiplies the images' losses.

    All images at once, for a fixed number of steps: it is not convex. The loss does not see the scale of h's weights
    (batch norm and normalize remove it), so a penalty in the loss would only shrink them; as decoupled decay it sets
    how far each step turns them.
    """
    head = TextHead(features_NF.shape[1], class_text_CD, temperature, seed).to(features_NF)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=fit_penalty, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fit_steps)
    head.train()
    with torch.enable_grad():
        for _ in range(fit_steps):
            loss = soft_cross_entropy(head(features_NF), target_NC, weight_N)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    head.settle_norm(features_NF)
    return head
