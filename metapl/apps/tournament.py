"""The method ``auto``: some recipes are tried on folds of the labeled pictures, and one is taken.

It is a short race by successive halving (Jamieson and Talwalkar, 2016): all recipes are trained
shortly without a fold of the labeled pictures and measured on that fold; the two most promising
ones go on to the other folds. Then the best is trained for the rest of the time on all labels.

How many steps each recipe gets is fixed before the race begins, and stands among the settings of
the run. So a run that is resumed, or repeated from its recipe, holds the same race.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
import tyro
from torch import Tensor

from metapl.apps.backbone import Control, accuracy_on_pixels
from metapl.apps.linear import Linear
from metapl.apps.methods import Method, Supervised, Trained, Training, Uda
from metapl.apps.self_training import TwoTeachers
from metapl.apps.settings import FINETUNE_STEPS, Fitting, with_flags
from metapl.data import draws
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.networks.tuned import Tuned, begin_as
from metapl.pictures.batches import EvaluationBatches
from metapl.runs.fields import Range
from metapl.training import FitResult, Trainer

# The folds that the labeled pictures are divided into; and the recipes that go on to all of them.
FOLDS = 3
FINALISTS = 2

# Keeps the draw of the folds apart from every other use of a seed.
_FOLDS_STREAM = 0xF01D

# Labeled pictures of a class below which unlabeled ones are learned beside mildly augmented ones.
# With 40 a class of Fashion-MNIST two teachers cost a point, and with 20 of castings eleven (63.7
# and 74.5 %). Between 10 and 20 nothing was measured.
FEW_LABELS = 20

# Where held-out labels are predicted as well as this, unlabeled pictures are learned however many
# labels there are, for what teachers say about them is nearly right: 0 is the accuracy of who names
# the largest class, and 1 that of who is always right. With 40 labels a class the mild recipe has
# 0.90 to 0.97 on the digits and on MNIST. There two teachers were worth a point on the three draws
# that suggested this, and nothing on three others. On Fashion-MNIST it has 0.62 to 0.74, and they
# cost a point. Between 0.74 and 0.90 nothing was measured.
NEARLY_RIGHT = 0.85

# What the names of the folders begin with in which a run keeps its trials.
TRIAL = "trial"

# Settings of a training that are numbers of its steps.
LENGTHS = ("warmup", "validate_every")

# Pictures in a batch of a measurement.
MEASURED_AT_ONCE = 256

# The standard deviation, in points, of what recipes reach on a problem that nobody has seen. The
# measured scores count in full where their standard error is small beside it.
SPREAD = 5.0

Augment = Literal["mild", "strong"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One of the recipes that are tried.

    On a fold a recipe is tried by a method on labels alone, whose steps are short, so that what is
    compared is how pictures are augmented. If it is the best, it is trained by a method that may
    learn unlabeled pictures too.

    Args:
        name: what it is called in the run's files and messages.
        augment: how pictures are augmented.
        mirror: whether half of them are mirrored, even where the settings do not ask for that.
        network: the network, where none was asked for; None: that of the settings.
        tried_by: the method on a fold.
        with_unlabeled: the method of the training, where unlabeled pictures are expected to help
            (:func:`unlabeled_help`).
        otherwise: the method of the training, where they are not. The strong recipe has the same
            one, which learns from them most of what it reaches.
        head_start: points of accuracy that it is given for what it gains by a long training and
            does not show in a short one.
        less_where_linear: points that are subtracted for each point that a linear layer is above
            chance. So the sum may be below 0; and they are subtracted also where the head start has
            ended.
        finetunes: whether the training is followed by steps on the labeled pictures alone, half of
            which are as they will be when they are predicted.
    """

    name: str
    augment: Augment
    mirror: bool = False
    network: str | None = None
    tried_by: Method
    with_unlabeled: Method
    otherwise: Method
    head_start: float = 0.0
    less_where_linear: float = 0.0
    finetunes: bool = False

    def method(self, open_settings: Sequence[str], *, learns_unlabeled: bool) -> Method:
        """Return the method of the training, where unlabeled pictures help or do not.

        Where an augmentation was asked for, there is no second teacher, which has another one.
        """
        method = self.with_unlabeled if learns_unlabeled else self.otherwise
        if isinstance(method, TwoTeachers) and "augment" not in open_settings:
            return method.with_one_teacher()
        return method

    def finetune_steps(self, steps: int) -> int:
        """Return the steps of finetuning after so many: as a method that is named has, or fewer."""
        return min(FINETUNE_STEPS, steps // 10) if self.finetunes else 0

    def settings(self, config: Any, open_settings: Sequence[str]) -> Any:
        """Return the settings of a training by this recipe; those that were asked for stay."""
        if "augment" in open_settings:
            config = with_flags(config, augment=self.augment)
        if "network" in open_settings and self.network is not None:
            config = config.with_network(self.network)
        return with_flags(config, mirror=config.pictures.mirror or self.mirror)

    def train(
        self,
        t: Training,
        labeled: Any,
        method: Method,
        *,
        lengths: Lengths,
        auto: Auto,
        finetune_steps: int = 0,
    ) -> Trained:
        """Train fresh networks by a method, on pictures that are augmented as the recipe says.

        Args:
            t: the training, whose settings and networks are those of another recipe.
            labeled: what has ``images`` and ``labels``: the labeled pictures to learn.
            method: the method.
            lengths: of all phases together.
            auto: says which settings are open, and the shares of the classes.
            finetune_steps: after them, for which the run calls what is returned.
        """
        config = with_flags(
            self.settings(t.config, auto.open_settings or ()),
            **lengths._asdict(),
            finetune_steps=finetune_steps,
        )
        batches = config.batches(labeled.images, labeled.labels, t.data.unlabeled.images)
        data = dataclasses.replace(t.data, **batches)
        torch.manual_seed(config.fitting.seed)
        teacher = config.network().to(t.place)
        student = config.network().to(t.place)
        if isinstance(teacher, Tuned):
            # As every training from a backbone: the head is the regression on its features.
            Control.of(teacher, data).start(teacher)
            begin_as(teacher, student)
        training = dataclasses.replace(
            t,
            config=config,
            data=data,
            teacher=teacher,
            student=student,
            fit=partial(t.fit, **lengths._asdict()),
        )
        method = with_flags(method, uda_prior=auto.uda_prior).scheduled(lengths.steps)
        trained = method.train(training)
        configs = {
            "student": config,
            "teacher": config,
            "finetuned": config,
            **trained.configs,
        }
        return dataclasses.replace(
            trained, finetunes=finetune_steps > 0, training=training, configs=configs
        )


# Of 400 pictures of Fashion-MNIST it learned 0.4 and 0.5 points more than pooled_cnn, in 80 seconds
# each, on two draws.
MILD_NETWORK = "strided_cnn"

MIXED_UP = Supervised(mixup=0.4, label_smoothing=0.1)

LINEAR = Recipe(
    name="linear",
    augment="mild",
    tried_by=Linear(),
    with_unlabeled=Linear(),
    otherwise=Linear(),
    head_start=-10.0,
)

MILD = Recipe(
    name="mild",
    augment="mild",
    network=MILD_NETWORK,
    tried_by=MIXED_UP,
    with_unlabeled=TwoTeachers(),
    otherwise=MIXED_UP,
)

MIRRORED = dataclasses.replace(MILD, name="mild and mirrored", mirror=True, head_start=-1.0)

STRONG = Recipe(
    name="strong",
    augment="strong",
    tried_by=MIXED_UP,
    with_unlabeled=Uda(),
    otherwise=Uda(),
    # It learns slowly, and most of what UDA learns from unlabeled pictures comes late: on textures
    # it was behind in 37 steps, and ahead by 53 points in a thousand.
    head_start=12.0,
    # Where a linear layer on the pixels tells classes apart, things stand at the same places in all
    # pictures, and strong changes hide what they are told by. On textures, arrows, digits on
    # clutter and tiles, where strong changes are better, it is 0 to 19 points above chance, and on
    # Fashion-MNIST and on wires of a harness, where they are worse, 27 to 57.
    less_where_linear=0.4,
    # On things to be counted, some of which a hole covers, it is worth 16 points.
    finetunes=True,
)

RECIPES = (MILD, MIRRORED, STRONG, LINEAR)

# Trainings of networks on a fold, all together; the linear one takes no time.
TRIALS = len(RECIPES) - 1 + FINALISTS * (FOLDS - 1)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a recipe has reached in a race.

    Args:
        recipe: the recipe.
        probabilities: (n, C), of the C classes, that it gives the n held-out pictures that it was
            measured on. Their order is the same for all recipes.
        labels: int64 (n,), of these pictures.
    """

    recipe: Recipe
    probabilities: Tensor
    labels: Tensor

    def with_pictures_of(self, standing: Standing) -> Standing:
        """Return what the recipe has reached on the pictures of both."""
        return Standing(
            recipe=self.recipe,
            probabilities=torch.cat([self.probabilities, standing.probabilities]),
            labels=torch.cat([self.labels, standing.labels]),
        )

    @property
    def accuracy(self) -> float:
        """Return the share of the pictures that it was right on; 0 where there were none."""
        is_right = self.probabilities.argmax(1) == self.labels
        return float(is_right.double().mean()) if len(is_right) else 0.0

    @property
    def scores(self) -> Tensor:
        r"""Return the quadratic score of each picture, float64 (n,), from 0 to 1.

        .. math:: 1 - \tfrac12 |p - y|^2

        p are the probabilities of the classes, and y is 1 at the label and 0 elsewhere. Who is sure
        of one class has 1 where that is right and 0 where it is wrong, so that the mean is the
        accuracy. What is less than sure counts by how sure it is: on few pictures this tells
        recipes apart where their accuracies hardly do.

        Source: Brier, "Verification of forecasts expressed in terms of probability" (1950).
        """
        p_NC = self.probabilities.double()
        y_NC = torch.nn.functional.one_hot(self.labels, p_NC.shape[1])
        return 1 - (p_NC - y_NC).square().sum(1) / 2


@dataclass(frozen=True, kw_only=True)
class Auto(Method):
    """Train by the best of several recipes, which are tried first on parts of the labels.

    Each recipe is trained shortly without a fold of the labeled pictures, and measured on it.

    Args:
        trial_share: share of the time, or of the steps, in which recipes are tried.
        trial_steps: of each recipe, the steps on a fold; None: they follow from the steps.
        final_steps: of each recipe, the steps of the training by it, if it is the best and
            unlabeled pictures are not expected to help.
        final_steps_with_unlabeled: of each recipe, the steps of the training where unlabeled
            pictures are expected to help.
        uda_prior: shares of the classes among the labeled pictures; None: equal ones.
        open_settings: those that were not asked for, of "augment" and "network", of which each
            recipe has its own, and of "warmup" and "validate_every", which follow from its steps.
    """

    trial_share: Annotated[float, Range(above=0, below=1)] = 0.125
    trial_steps: tyro.conf.Suppress[tuple[int, ...] | None] = None
    final_steps: tyro.conf.Suppress[tuple[int, ...] | None] = None
    final_steps_with_unlabeled: tyro.conf.Suppress[tuple[int, ...] | None] = None
    uda_prior: tyro.conf.Suppress[tuple[float, ...] | None] = None
    open_settings: tyro.conf.Suppress[tuple[str, ...] | None] = None

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "the best of several recipes"

    def scheduled(self, steps: int) -> Self:
        """Return the method with the steps of each recipe, where none were given.

        All recipes get as many. By minutes each gets what it has time for, and
        :mod:`metapl.apps.look` gives the steps.
        """
        if None not in (self.trial_steps, self.final_steps, self.final_steps_with_unlabeled):
            return self
        trial = max(1, round(self.trial_share * steps / TRIALS))
        final = max(1, steps - trial * TRIALS)
        final_steps = (final,) * len(RECIPES)
        return dataclasses.replace(
            self,
            trial_steps=(trial,) * len(RECIPES),
            final_steps=final_steps,
            final_steps_with_unlabeled=final_steps,
        )

    def with_flags_beside(self, names: Collection[str], repeated_share: float) -> Self:
        """Return the method of a repeated run beside which some settings were asked for.

        These are no recipe's own any more. Another number of steps is divided anew, and so are the
        steps by another share of them; another share of the time is as many more or fewer steps.

        Args:
            names: of the settings.
            repeated_share: ``trial_share`` of the run that is repeated.
        """
        open_names = tuple(name for name in self.open_settings or () if name not in names)
        method = dataclasses.replace(self, open_settings=open_names)
        if not {"steps", "trial_share"} & {*names}:
            return method
        # By minutes a linear layer has one step, and by steps as many as the networks.
        is_by_steps = len(set(self.final_steps or ())) < 2
        if "steps" in names or is_by_steps:
            return dataclasses.replace(
                method, trial_steps=None, final_steps=None, final_steps_with_unlabeled=None
            )
        assert self.trial_steps is not None, "a run by minutes has a plan"
        assert self.final_steps is not None, "a run by minutes has a plan"
        assert self.final_steps_with_unlabeled is not None, "a run by minutes has a plan"
        trial_factor = self.trial_share / repeated_share
        final_factor = (1 - self.trial_share) / (1 - repeated_share)
        return dataclasses.replace(
            method,
            trial_steps=multiplied(self.trial_steps, trial_factor),
            final_steps=multiplied(self.final_steps, final_factor),
            final_steps_with_unlabeled=multiplied(self.final_steps_with_unlabeled, final_factor),
        )

    def train(self, t: Training) -> Trained:
        """Hold the race, and train by the recipe that wins it."""
        assert self.trial_steps is not None, "the steps were chosen"
        assert self.final_steps is not None, "the steps were chosen"
        assert self.final_steps_with_unlabeled is not None, "the steps were chosen"
        race = Race(t=t, auto=self, trial_steps=self.trial_steps)
        all_recipes, finalists = race.run()
        winner = most_promising_first(finalists, race.linear_advantage)[0]
        best = winner.recipe
        labeled = t.data.labeled
        open_names = self.open_settings or ()
        learns_unlabeled = unlabeled_help(labeled.labels, len(t.data.classes), winner.accuracy)
        method = best.method(open_names, learns_unlabeled=learns_unlabeled)
        final_steps = self.final_steps_with_unlabeled if learns_unlabeled else self.final_steps
        steps = final_steps[RECIPES.index(best)]
        settings = best.settings(t.config, open_names)
        t.say(
            f"method: {best.name}, {settings.pictures.augment} augmentation, {method.title}; "
            f"{sentence(all_recipes, finalists, best)}"
        )
        trained = best.train(
            t,
            labeled,
            method,
            lengths=lengths_of(t.config.fitting, steps, names=open_names),
            auto=self,
            finetune_steps=best.finetune_steps(steps),
        )
        return dataclasses.replace(
            trained,
            # Checkpoints and curves of the trials. A run that is stopped goes on with them. Of one
            # that has ended nobody reads them.
            leftovers=tuple(sorted(t.folder.glob(f"*/{TRIAL}-*"))),
            chosen={
                "recipe": best.name,
                "method": method.name,
                "augment": settings.pictures.augment,
                "mirror": settings.pictures.mirror,
                "network": settings.pictures.network,
                "lr": settings.fitting.lr,
                "steps": steps,
                "finetune_steps": best.finetune_steps(steps),
                "first_fold": accuracies(all_recipes),
                "all_folds": accuracies(finalists),
            },
        )


# ----------------------------------------------------------------------------------------- the race


@dataclass(frozen=True, kw_only=True, eq=False)
class Race:
    """A race of the recipes on folds of the labeled pictures.

    Args:
        t: the training, on all labeled pictures.
        auto: the settings of the method.
        trial_steps: of each recipe, its steps on a fold.
    """

    t: Training
    auto: Auto
    trial_steps: Sequence[int]

    def run(self) -> tuple[list[Standing], list[Standing]]:
        """Return what all recipes reach on the first fold, and the finalists on all folds."""
        labels_N = self.t.data.labeled.labels
        fold_N = folds_of(labels_N, self.t.config.fitting.seed)
        all_recipes = [self.measure_on_fold(recipe, fold_N, fold=0) for recipe in RECIPES]
        finalists = most_promising_first(all_recipes, self.linear_advantage)[:FINALISTS]
        for fold in range(1, FOLDS):
            finalists = [
                standing.with_pictures_of(self.measure_on_fold(standing.recipe, fold_N, fold=fold))
                for standing in finalists
            ]
        return all_recipes, finalists

    @cached_property
    def linear_advantage(self) -> float:
        """Return :func:`measure_linear_advantage` of the labeled pictures, measured once."""
        labeled = self.t.data.labeled
        seed = self.t.config.fitting.seed
        return measure_linear_advantage(labeled.images, labeled.labels, seed=seed)

    def measure_on_fold(self, recipe: Recipe, fold_N: Tensor, *, fold: int) -> Standing:
        """Train without a fold, and return what the recipe reaches on its pictures."""
        t = self.t
        held_out_rows = (fold_N == fold).nonzero()[:, 0]
        if not len(held_out_rows):
            # The classes have fewer pictures than there are folds.
            no_probabilities = torch.zeros(0, len(t.data.classes))
            return Standing(recipe=recipe, probabilities=no_probabilities, labels=held_out_rows)
        labeled = t.data.labeled
        learned_rows = (fold_N != fold).nonzero()[:, 0]
        number = RECIPES.index(recipe)
        trial = dataclasses.replace(
            t,
            fit=TrialFit(fit=t.fit, name=f"{TRIAL}-{number}-{fold}"),
            say=lambda text: None,
        )
        trained = recipe.train(
            trial,
            LabeledPart(labeled.images.select(learned_rows), labeled.labels[learned_rows]),
            recipe.tried_by,
            lengths=lengths_of(t.config.fitting, self.trial_steps[number], names=LENGTHS),
            auto=self.auto,
        )
        network = trained.trainer.student
        network.load_state_dict(dict(trained.result.weights))
        examples = EvaluationBatches(
            labeled.images.select(held_out_rows), labeled.labels[held_out_rows], MEASURED_AT_ONCE
        )
        logits_BC, labels_B = predict_logits(network, batches_of(examples, t.place))
        return Standing(
            recipe=recipe,
            probabilities=logits_BC.float().softmax(1).cpu(),
            labels=labels_B.cpu(),
        )


class LabeledPart(NamedTuple):
    """Labeled pictures that are learned.

    Args:
        images: the pictures.
        labels: int64 (n,).
    """

    images: Any
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class TrialFit:
    """Runs the phases of a trial, each under a name of its own, and without a validation.

    Args:
        fit: runs a phase of the training.
        name: of the trial.
    """

    fit: Callable[..., FitResult]
    name: str

    def __call__(self, trainer: Trainer, labeled: Any, unlabeled: Any, **options: Any) -> FitResult:
        """Run a phase."""
        phase = options.pop("phase", "fit")
        trial_options = {
            **options,
            "phase": f"{self.name}-{phase}",
            "truth": None,
            "validation": None,
            "select": False,
            # It would wait for validations.
            "patience": None,
        }
        return self.fit(trainer, labeled, unlabeled, **trial_options)


def multiplied(steps: Sequence[int], factor: float) -> tuple[int, ...]:
    """Return numbers of steps times a factor, at least one each."""
    return tuple(max(1, round(factor * number)) for number in steps)


class Lengths(NamedTuple):
    """How long a training is, and what is counted in its steps.

    Args:
        steps: of the training.
        warmup: steps of the warm-up.
        validate_every: steps from one validation to the next.
    """

    steps: int
    warmup: int
    validate_every: int


def lengths_of(fitting: Fitting, steps: int, names: Collection[str]) -> Lengths:
    """Return the lengths of a training of a run.

    Args:
        fitting: of the run.
        steps: of the training.
        names: those of :data:`LENGTHS` that are the same share of these steps as they are of the
            steps of the run. The others stay as they were asked for.

    >>> lengths_of(Fitting(steps=100, warmup=5, validate_every=10), 40, names=["warmup"])
    Lengths(steps=40, warmup=2, validate_every=10)
    """

    def length(name: str) -> int:
        asked: int = getattr(fitting, name) or 0
        return round(asked * steps / fitting.chosen_steps) if name in names else asked

    return Lengths(
        steps=steps, warmup=length("warmup"), validate_every=max(1, length("validate_every"))
    )


def folds_of(labels_N: Tensor, seed: int) -> Tensor:
    """Return the fold of each picture, −1 for the only one of a class, which is always learned.

    The pictures of each class are dealt out in an order that is drawn by the seed.

    >>> folds_of(torch.tensor([0, 0, 0, 1, 1, 2]), seed=0).sort().values
    tensor([-1,  0,  0,  1,  1,  2])
    """
    drawn = draws.bits(seed, 0, torch.arange(len(labels_N)), 1, _FOLDS_STREAM)[:, 0]
    order = torch.argsort(drawn, stable=True)
    fold_N = torch.full((len(labels_N),), -1)
    for label in labels_N.unique():
        rows = order[labels_N[order] == label]
        if len(rows) > 1:
            fold_N[rows] = torch.arange(len(rows)) % FOLDS
    return fold_N


def measure_linear_advantage(images: Any, labels: Tensor, *, seed: int) -> float:
    """Return by how many points a linear layer on the pixels is above chance; 0 at least.

    Args:
        images: labeled pictures.
        labels: int64 (n,), of these.
        seed: of the folds that it is measured on.
    """
    accuracy = accuracy_on_pixels(images, labels, seed=seed)
    counts = torch.bincount(labels)
    chance = float(counts.max() / counts.sum())
    return max(0.0, 100 * (accuracy - chance))


def most_promising_first(standings: Sequence[Standing], linear_advantage: float) -> list[Standing]:
    """Return recipes that were measured on the same pictures, the most promising one first.

    Args:
        standings: of the recipes.
        linear_advantage: points by which a linear layer is above chance.
    """
    scores = points_of(standings, linear_advantage)
    return sorted(standings, key=lambda standing: scores[standing.recipe.name], reverse=True)


def points_of(standings: Sequence[Standing], linear_advantage: float) -> dict[str, float]:
    r"""Return by how much each recipe is expected to be ahead of the others, in points.

    .. math:: h_i - c_i\, l + \frac{u^2}{u^2 + e_i^2}\,\bar a_i, \qquad
              u^2 = \frac{R - 1}{R}\, s^2, \qquad
              e_i^2 = \frac{1}{n^2} \Big( \sum_k (a_{ik} - \bar a_i)^2 + 50^2 \Big)

    a are the quadratic scores on n pictures (:attr:`Standing.scores`), in points, minus the mean
    over the R recipes, picture by picture; ā is their mean over the pictures. e is the standard
    error of ā (:func:`squared_error`). s is :data:`SPREAD`, and u what it is of a difference to the
    mean. h is the head start, and c·l what is taken from it because a linear layer is l points
    above chance.

    It is the mean of a normal distribution whose prior is the head start: on few pictures the head
    start decides, and on many the scores do. A head start above 0 is for what a short training does
    not show, and counts only as long as the pictures leave open who is ahead
    (:func:`is_surely_behind`).
    """
    scores_RN = torch.stack([standing.scores for standing in standings])
    advantages_RN = 100 * (scores_RN - scores_RN.mean(0))
    recipes, pictures = scores_RN.shape
    squared_spread = SPREAD**2 * (recipes - 1) / recipes
    points = {}
    for standing, advantages_N in zip(standings, advantages_RN, strict=True):
        recipe = standing.recipe
        head_start = recipe.head_start
        if head_start > 0 and is_surely_behind(standing, standings):
            head_start = 0.0
        points[recipe.name] = head_start - recipe.less_where_linear * linear_advantage
        if pictures:
            shrinkage = squared_spread / (squared_spread + squared_error(advantages_N))
            points[recipe.name] += shrinkage * float(advantages_N.mean())
    return points


def is_surely_behind(standing: Standing, standings: Sequence[Standing]) -> bool:
    """Return whether another network is ahead of a recipe's by more than a standard error.

    A linear layer is not asked: it has all of its accuracy at once.
    """
    for rival in standings:
        is_network = not isinstance(rival.recipe.tried_by, Linear)
        if rival is standing or not is_network or not len(rival.labels):
            continue
        lead_N = 100 * (rival.scores - standing.scores)
        if float(lead_N.mean()) > squared_error(lead_N) ** 0.5:
            return True
    return False


def squared_error(points_N: Tensor) -> float:
    """Return the squared standard error of a mean over n pictures.

    One picture more is taken to be half a score, 50 points, away from the mean, so that the error
    of few pictures is not small by chance.
    """
    squares = float((points_N - points_N.mean()).square().sum()) + 50**2
    return squares / len(points_N) ** 2


def unlabeled_help(labels_N: Tensor, classes: int, accuracy: float) -> bool:
    """Return whether unlabeled pictures are expected to help a training.

    Unlabeled pictures are expected to help where labels are few (:data:`FEW_LABELS`), or where what
    a network says about pictures is nearly right (:data:`NEARLY_RIGHT`).

    Args:
        labels_N: int64 (N,), of the labeled pictures.
        classes: number of the classes.
        accuracy: on held-out labeled pictures, of the recipe that is taken.

    >>> four_hundred = torch.arange(400) % 10
    >>> unlabeled_help(four_hundred, 10, accuracy=0.75)
    False
    >>> unlabeled_help(four_hundred, 10, accuracy=0.95)
    True
    """
    if len(labels_N) < FEW_LABELS * classes:
        return True
    chance = float(labels_N.bincount().max()) / len(labels_N)
    return accuracy >= chance + NEARLY_RIGHT * (1 - chance)


def by_accuracy(standings: Sequence[Standing]) -> list[Standing]:
    """Return recipes by their accuracy, the best one first."""
    return sorted(standings, key=lambda standing: standing.accuracy, reverse=True)


def accuracies(standings: Sequence[Standing]) -> dict[str, float]:
    """Return the accuracy of each recipe by its name."""
    return {standing.recipe.name: round(standing.accuracy, 4) for standing in standings}


def sentence(all_recipes: Sequence[Standing], finalists: Sequence[Standing], best: Recipe) -> str:
    """Return in words what was tried, what it reached, and why another one was not taken."""
    pictures = len(finalists[0].labels)
    if not pictures:
        return "no class has two labeled pictures, so that nothing could be tried"
    tried = [
        f"{standing.recipe.name} {standing.accuracy:.0%}" for standing in by_accuracy(finalists)
    ]
    names = {standing.recipe.name for standing in finalists}
    for standing in by_accuracy(all_recipes):
        if standing.recipe.name not in names:
            first_fold = len(standing.labels)
            tried.append(f"{standing.recipe.name} {standing.accuracy:.0%} (on {first_fold:,})")
    text = f"tried shortly on {pictures:,} held-out labels: {', '.join(tried)}"
    rival = more_accurate_than(best, all_recipes, finalists)
    if rival is not None:
        text += (
            f"; {rival.name} was right more often, and {best.name} is ahead by its score and its "
            "head start"
        )
    return text


def more_accurate_than(
    best: Recipe, all_recipes: Sequence[Standing], finalists: Sequence[Standing]
) -> Recipe | None:
    """Return the recipe that was right most often, if it was so more often than the best one.

    The same pictures are compared: those of all folds among the finalists, and those of the first
    fold among all recipes.

    Args:
        best: the recipe that is taken, a finalist.
        all_recipes: on the first fold.
        finalists: on all folds.
    """
    for standings in (finalists, all_recipes):
        most_accurate = by_accuracy(standings)[0]
        accuracy = next(standing.accuracy for standing in standings if standing.recipe is best)
        if most_accurate.accuracy > accuracy:
            return most_accurate.recipe
    return None
