"""Logistic regression as a method: the baseline that a training must not lose to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metapl.apps.backbone import Control
from metapl.apps.methods import Method, Trained, Training
from metapl.apps.settings import with_flags
from metapl.networks.tuned import Normalized, Tuned
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer

# The network of pictures without a backbone: one layer on their pixels.
NETWORK = "linear"


@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    """Fit logistic regression on the pixels of the labeled pictures, or on a backbone's features.

    The network that it ends with computes what the regression does.
    """

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "logistic regression"

    def train(self, t: Training) -> Trained:
        """Fit the regression, and write it into a network."""
        control = Control.of(t.teacher, t.data)
        config = t.config
        network = t.teacher
        if not isinstance(network, Tuned):
            # It has no weights of another network, and nothing that noise could drop.
            config = with_flags(
                t.config,
                network=NETWORK,
                weights=None,
                weights_sha256=None,
                dropout=0.0,
                stochastic_depth=0.0,
            )
            network = config.network().to(t.place)
        assert isinstance(network, Normalized), "networks of pictures are"
        control.start(network)
        # Nothing is trained by it. What a method ends with is a trainer, whatever it has done.
        trainer = LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.0))
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        result = FitResult(None, 0, weights)
        return Trained(trainer, result, finetunes=False, configs={"student": config})
