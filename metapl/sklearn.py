"""Classifiers for tables, with scikit-learn's interface.

One learns from few labels and many unlabeled rows, the other from labels of which some are wrong.

Both standardize each column by its mean and deviation over the rows that ``fit`` is given, train
small networks on these, and predict by one of them on the CPU. What they draw comes from
``random_state``: the same seed gives the same weights on one machine, and the default generators of
torch, NumPy and Python stay as they were. None draws the seed from NumPy's, as elsewhere in
scikit-learn.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metapl.data import StepBatches, StepSampler
from metapl.data.draws import fold_in
from metapl.errors import MetaplError, few, needed_for
from metapl.execution.checks import described
from metapl.feedback import Mode, estimator
from metapl.metrics.predictions import logits_of
from metapl.models import mlp
from metapl.problems import ExampleWeights, Table
from metapl.runs.checkpoint import rng_state, set_rng_state
from metapl.runs.fields import AboveZero, AtLeastOne, Range, check_fields
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

with needed_for("metapl.sklearn"):
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.metrics import accuracy_score
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_consistent_length, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        assert_all_finite,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )

__all__ = ["MetaPseudoLabelsClassifier", "MetaReweightedClassifier"]

Array = np.ndarray[Any, Any]
Network = Callable[[int, int], nn.Module]
ZeroOrMore = Annotated[float, Range(0)]
AtLeastTwo = Annotated[int, Range(2)]

# Rows in a pass of a network that predicts.
AT_ONCE = 1024

# Whoever draws holds this lock, for the default generators are those of all threads.
_DRAWING = threading.RLock()

# How a missing label reads.
_MISSING = ("None", "nan", "<NA>", "NaT")

# How it also reads where some of the rows may have no label.
_UNLABELED = ("-1", "-1.0")


@dataclass(frozen=True)
class _Rows(StepBatches[Any]):
    """Shuffled batches of the same rows of each column.

    Args:
        columns: tensors with a row for each example.
        sampler: of the rows.
        noise: standard deviation of the noise of a second view of the only column; with 0 there is
            one view. None: the columns are given as they are.
        weights: rows are drawn in proportion to these; None: all are, in shuffled passes.
        steps: None, for the batches have no end.
    """

    columns: tuple[Tensor, ...]
    sampler: StepSampler
    noise: float | None = None
    weights: Tensor | None = None
    steps: None = None

    def batch(self, step: int) -> Any:
        """Return the batch of a step."""
        generator = torch.Generator().manual_seed(fold_in(self.sampler.seed, step))
        rows = self.sampler.indices(step)
        if self.weights is not None:
            rows = torch.multinomial(self.weights, len(rows), replacement=True, generator=generator)
        columns = tuple(column[rows] for column in self.columns)
        if self.noise is None:
            return columns
        x = columns[0]
        if self.noise == 0:
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x, x + self.noise * noise.to(x.device)


@dataclass(eq=False, repr=False)
class _Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped bases
    """Rows and labels of scikit-learn in, one trained network out."""

    hidden_layer_sizes: AtLeastOne | tuple[AtLeastOne, ...] = (64,)
    _: KW_ONLY
    network: Network | None = None
    mode: Mode = "forward"
    steps: AtLeastOne = 300
    batch_size: AtLeastOne = 64
    learning_rate: AboveZero = 0.05
    weight_decay: ZeroOrMore = 0.02
    device: str = "cpu"
    verbose: bool = False
    random_state: Any = None

    # Whether rows may have no label.
    _partly: ClassVar[bool] = False

    def predict_proba(self, X: Any) -> Array:
        """Return the class probabilities of the rows of X, (n, classes), as in ``classes_``."""
        check_is_fitted(self)
        x = self._standardized(validate_data(self, X, reset=False, dtype=np.float64))
        logits = logits_of(self.network_, x.split(AT_ONCE))
        return logits.double().softmax(-1).numpy()

    def predict(self, X: Any) -> Array:
        """Return the most probable class of each row of X."""
        check_is_fitted(self)
        labels: Array = self.classes_[self.predict_proba(X).argmax(1)]
        return labels

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on the rows of X that have a label in y.

        So cross-validation does without the others.
        """
        predicted = self.predict(X)
        is_labeled, labels = self._labels_of(predicted, y)
        weights = None
        if sample_weight is not None:
            weights = np.asarray(sample_weight)[is_labeled]
        return float(accuracy_score(labels, predicted[is_labeled], sample_weight=weights))

    def _labels_of(self, X: Array, y: Any, *, warn: bool = False) -> tuple[Array, Array]:
        """Return which rows have a label, and these labels."""
        if isinstance(y, list | tuple):
            # An array of texts would take NaN for one of them.
            y = np.array(y, object)
        y = column_or_1d(y, warn=warn)
        check_consistent_length(X, y)
        missing = (*_MISSING, *_UNLABELED) if self._partly else _MISSING
        is_labeled = ~np.isin([str(label) for label in y], missing)
        if not self._partly and not is_labeled.all():
            raise MetaplError(
                f"y contains NaN or None, in {np.sum(~is_labeled):,} rows; expected a label for "
                "each row."
            )
        labels = y[is_labeled]
        if labels.dtype == object and not any(isinstance(label, str) for label in labels):
            # They are the numbers of a column that has None too.
            labels = np.array(labels.tolist())
        return is_labeled, labels

    def _standardized(self, X: Array) -> Tensor:
        """Return the rows in deviations from the means of the columns; refuse infinite ones."""
        with np.errstate(over="ignore", invalid="ignore"):
            x = self.scaler_.transform(X).astype(np.float32)
            assert_all_finite(x, input_name="standardized X")
        return torch.from_numpy(x)

    @contextmanager
    def _fitting(self, X: Any, y: Any) -> Iterator[tuple[Tensor, Array, Array, int]]:
        """Prepare a fit, whose draws are the only ones in the block.

        It yields standardized rows where the networks are trained, which of them have a label, the
        classes of these by number, and a seed.
        """
        check_fields(self)
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        is_labeled, y = self._labels_of(X, y, warn=True)
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            mend = ""
            if self._partly:
                mend = "; -1 is a missing label here, and no class"
            raise MetaplError(
                f"y has the classes {few(self.classes_)}; expected labels of two or more{mend}."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            self.scaler_ = StandardScaler().fit(X)
            assert_all_finite(self.scaler_.var_, input_name="the variance of X")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        x = self._standardized(X).to(self.device)
        with _DRAWING:
            generators = rng_state()
            try:
                torch.manual_seed(seed)
                yield x, is_labeled, codes, seed
            finally:
                set_rng_state(generators)

    def _built(self, x: Tensor) -> nn.Module:
        """Build a network for the rows x, with first weights of its own."""
        columns = x.shape[1]
        classes = len(self.classes_)
        if self.network is None:
            hidden = np.atleast_1d(self.hidden_layer_sizes).tolist()
            return mlp([columns, *hidden, classes]).to(x)
        network = self.network(columns, classes).to(x)
        shape = tuple(logits_of(network, [x[:2]]).shape)
        if shape != (2, classes):
            raise MetaplError(
                f"the network of network= gives outputs {shape} for 2 rows; expected "
                f"{(2, classes)}."
            )
        return network

    def _optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """Build the optimizer of a network."""
        return torch.optim.SGD(
            network.parameters(),
            lr=self.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.weight_decay,
        )

    def _batches(
        self, seed: int, *columns: Tensor, noise: float | None = None, weights: Tensor | None = None
    ) -> _Rows:
        """Return shuffled batches of the rows of these columns, as :class:`_Rows` has them."""
        size = len(columns[0])
        sampler = StepSampler(size, min(self.batch_size, size), seed)
        return _Rows(columns, sampler, noise=noise, weights=weights)


@dataclass(eq=False, repr=False, kw_only=True)
class MetaPseudoLabelsClassifier(_Classifier):
    r"""Meta Pseudo Labels for tables.

    A teacher labels all rows, a student learns from these labels, and the teacher from how the
    student then does on the rows with labels. The student sees the rows with noise, where ``noise``
    is not 0; the teacher labels them as they are, and learns to say the same of both
    (:class:`metapl.UDA`). Prediction is by the student.

    Args:
        hidden_layer_sizes: widths between the columns and the classes, of both networks.
        network: in their place, a function (columns, classes) -> ``torch.nn.Module`` that gives
            logits.
        mode: of :class:`metapl.BilevelTrainer`; ``"none"`` is the control without feedback.
        steps: of training, with a cosine schedule.
        batch_size: rows in a batch of each kind, or all that there are.
        learning_rate, weight_decay: of both networks' SGD with Nesterov momentum 0.9.
        noise: standard deviation of the noise, in deviations of each column; 0: one view, and no
            consistency.
        feedback_weight, feedback_ratio, feedback_bound: as of :class:`metapl.BilevelTrainer`.
        device: where it is trained.
        verbose: show a bar.
        random_state: as elsewhere in scikit-learn.

    Attributes: ``classes_``, ``n_features_in_``, ``feature_names_in_``, ``scaler_`` (a
    ``StandardScaler``), and ``network_``, the student, on the CPU.

    Cost: ``steps`` steps of the mode, whatever the number of rows.

    Source: Pham et al., "Meta Pseudo Labels" (CVPR 2021), Algorithm 1.

    >>> from sklearn.datasets import make_moons
    >>> X, y = make_moons(200, noise=0.1, random_state=0)
    >>> # Ten rows keep their labels.
    >>> y[10:] = -1
    >>> MetaPseudoLabelsClassifier(steps=20, random_state=0).fit(X, y).predict_proba(X).shape
    (200, 2)
    """

    noise: ZeroOrMore = 0.5
    feedback_weight: float | None = None
    feedback_ratio: ZeroOrMore | None = None
    feedback_bound: ZeroOrMore | None = None
    _partly: ClassVar[bool] = True

    def fit(self, X: Any, y: Any) -> MetaPseudoLabelsClassifier:
        """Train on rows of which some have a label.

        Args:
            X: (n, columns) numbers, none of them missing; dense.
            y: (n,) classes, numbers or texts. A row without a label has -1, as a number or as the
                text "-1", None or NaN. Where every row has a label, a warning says so, and the
                training goes on.

        Returns: this classifier.
        Raises: ValueError; :class:`metapl.MetaplError` is one.
        """
        with self._fitting(X, y) as (x, is_labeled, codes, seed):
            if is_labeled.all():
                warnings.warn(
                    "every row of y has a label, and none -1 for a missing one; a "
                    "VotingClassifier, or another that numbers the labels anew, makes a class of "
                    "-1",
                    stacklevel=2,
                )
            teacher = self._built(x)
            student = self._built(x)
            trainer = BilevelTrainer(
                teacher,
                student,
                self.mode,
                inner_optimizer=self._optimizer(student),
                outer_optimizer=self._optimizer(teacher),
                feedback_weight=self.feedback_weight,
                feedback_ratio=self.feedback_ratio,
                feedback_bound=self.feedback_bound,
            )
            labels = torch.from_numpy(codes).to(x.device)
            labeled = self._batches(seed, x[is_labeled], labels)
            trainer.fit(
                labeled,
                self._batches(seed + 1, x, noise=self.noise),
                steps=self.steps,
                progress=self.verbose,
            )
            self.network_ = student.cpu()
        return self


@dataclass(eq=False, repr=False, kw_only=True)
class MetaReweightedClassifier(_Classifier):
    r"""Learning from labels of which some are wrong.

    Each row has a weight, which is learned from rows to be trusted.

    With trusted rows, :class:`metapl.problems.ExampleWeights` learns the weights a_i in (0, 1):
    they fall where a step on the row raises the loss on the trusted rows. Then a network with new
    first weights is trained on all rows, each drawn in proportion to its weight, and the trusted
    ones to 1.

    Without trusted rows nothing tells a wrong label from a right one but the other rows. The rows
    are then divided into folds, and a row has the weight 1 where a network that was trained on the
    other folds gives it its own label, and 0 where it does not; the rows of a class that would have
    no row left keep the weight 1. No feedback is used.

    Args:
        hidden_layer_sizes, network, batch_size: as of :class:`MetaPseudoLabelsClassifier`.
        learning_rate, weight_decay, device, verbose, random_state: as there.
        mode: one for differentiable signals, used with trusted rows; ``"none"`` is the control:
            plain training without trusted rows, and equal weights of all rows but the trusted ones
            with them.
        steps: of each of the two trainings; the networks of the folds share as many.
        weights_learning_rate: of the weights' Adam, in logits.
        folds: into which the rows are divided where ``fit`` is not told which are trusted.

    Attributes: ``classes_``, ``n_features_in_``, ``feature_names_in_``, ``scaler_`` (a
    ``StandardScaler``), ``weights_`` (n,) of the rows of ``fit``, 1 for trusted ones, and
    ``network_`` on the CPU.

    Cost: ``steps`` steps of the mode and as many of plain training, whatever the number of rows.

    >>> from sklearn.datasets import make_moons
    >>> X, y = make_moons(200, noise=0.1, random_state=0)
    >>> trusted = np.arange(200) < 20
    >>> # Forty labels are wrong.
    >>> y[20:60] = 1 - y[20:60]
    >>> found = MetaReweightedClassifier(random_state=0).fit(X, y, trusted=trusted)
    >>> bool(found.weights_[20:60].mean() < found.weights_[60:].mean())
    True
    """

    weights_learning_rate: AboveZero = 0.2
    folds: AtLeastTwo = 5

    def fit(self, X: Any, y: Any, trusted: Any = None) -> MetaReweightedClassifier:
        """Learn a weight of each row, and train on the weighted rows.

        Args:
            X: (n, columns) numbers, none of them missing; dense.
            y: (n,) classes, numbers or texts, some of them wrong.
            trusted: (n,) True where a label is known to be right, for one row of each class or
                more. None: folds of the rows check each other's labels.

        Returns: this classifier.
        Raises: ValueError; :class:`metapl.MetaplError` is one.
        """
        with self._fitting(X, y) as (x, _, codes, seed):
            mode = estimator(self.mode)
            if "soft" not in mode.labels:
                raise MetaplError(
                    f"mode {mode.name!r} takes sampled signals alone; expected 'forward', say, or "
                    "'none'."
                )
            labels = torch.from_numpy(codes).to(x.device)
            if trusted is None:
                weights = torch.ones(len(x), dtype=torch.float64)
                if mode.credits != "nothing":
                    weights = self._checked_by_folds(x, labels, seed)
            else:
                weights = self._learned_weights(x, labels, self._trusted_mask(trusted, codes), seed)
            network = self._built(x)
            rows = self._batches(seed + 2, x, labels, weights=weights)
            trainer = LossTrainer(network, optimizer=self._optimizer(network))
            trainer.fit(rows, steps=self.steps, progress=self.verbose)
            self.weights_ = weights.numpy()
            self.network_ = network.cpu()
        return self

    def _trusted_mask(self, trusted: Any, codes: Array) -> Tensor:
        """Refuse what is no mask of the rows, or of no row of some class, or of all rows."""
        mask = np.asarray(trusted)
        if mask.shape != codes.shape or mask.dtype != bool:
            raise MetaplError(
                f"trusted= is {described(mask)}; expected {len(codes)} truth values, one a row."
            )
        missing = np.setdiff1d(np.arange(len(self.classes_)), codes[mask])
        if len(missing):
            # The weights of a class that is not among them would fall to 0.
            raise MetaplError(
                f"no trusted row is of {few(self.classes_[missing])}; expected all classes."
            )
        if mask.all():
            raise MetaplError("all rows are trusted; expected some to be weighed.")
        return torch.tensor(mask)

    def _learned_weights(self, x: Tensor, labels: Tensor, is_trusted: Tensor, seed: int) -> Tensor:
        """Return the weight of each row, (n,), learned from the loss on the trusted rows."""
        is_doubtful = ~is_trusted
        count = int(is_doubtful.sum())
        numbers = torch.arange(count, device=x.device)
        table = Table(torch.zeros(count, device=x.device))
        student = self._built(x)
        trainer = BilevelTrainer(
            table,
            student,
            self.mode,
            problem=ExampleWeights(),
            inner_optimizer=self._optimizer(student),
            outer_optimizer=torch.optim.Adam(table.parameters(), lr=self.weights_learning_rate),
        )
        trainer.fit(
            self._batches(seed, x[is_trusted], labels[is_trusted]),
            self._batches(seed + 1, x[is_doubtful], labels[is_doubtful], numbers),
            steps=self.steps,
            first_steps=0,
            progress=self.verbose,
        )
        weights = torch.ones(len(x), dtype=torch.float64)
        weights[is_doubtful] = table.values.detach().cpu().double().sigmoid()
        return weights

    def _checked_by_folds(self, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Return 1 for each row whose label networks of the other folds give it, else 0, (n,)."""
        shuffled = torch.randperm(len(x))
        # Along the classes, so that each fold has its share of each of them.
        by_class = shuffled[labels.cpu()[shuffled].argsort(stable=True)]
        fold_of_row = torch.empty(len(x), dtype=torch.int64)
        fold_of_row[by_class] = torch.arange(len(x)) % self.folds
        weights = torch.zeros(len(x), dtype=torch.float64)
        # Short trainings: networks that have learned wrong labels by heart say less about others.
        steps = max(1, self.steps // self.folds)
        for fold in range(min(self.folds, len(x))):
            is_checked = fold_of_row == fold
            network = self._built(x)
            rows = self._batches(seed + 3 + fold, x[~is_checked], labels[~is_checked])
            trainer = LossTrainer(network, optimizer=self._optimizer(network))
            trainer.fit(rows, steps=steps, progress=self.verbose)
            predicted = logits_of(network, x[is_checked].split(AT_ONCE)).argmax(-1)
            weights[is_checked] = (predicted == labels[is_checked].cpu()).double()
        for code in labels.unique():
            is_of_class = (labels == code).cpu()
            if not weights[is_of_class].any():
                weights[is_of_class] = 1.0
        return weights
