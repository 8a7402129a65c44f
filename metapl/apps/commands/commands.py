"""The commands by name, what is said of them, and the scripts by which shells complete them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from importlib import import_module
from typing import Annotated, Any, Union

from metapl.apps.machine.memory import LESS
from metapl.errors import MetaplError

# Where each is: a class, or of those whose first word is a choice the classes by that word, which are imported when
# they are asked for.
COMMANDS = {
    "train": "train.COMMANDS",
    "noisy-student": "train.NOISY_STUDENT",
    "ablate": "ablate.COMMANDS",
    "evaluate": "evaluate.Evaluate",
    "predict": "predict.Predict",
    "compare": "compare.Compare",
    "runs": "listing.Runs",
    "report": "report.Report",
    "attribute": "attribute.Attribute",
    "export": "runs.Export",
    "label": "labels.Label",
    "labels": "labels.COMMANDS",
}

# Flags that make another command of one.
BY_FLAG = {"ablate": ("--factory", "ablate.AblateFactory")}

# First words that make another command of one whose first word is else a folder.
BY_WORD = {"attribute": (("images", "noisy"), "attribute.OF_RECIPES")}

HELP = """\
metapl trains a classifier from a few labeled examples and many unlabeled
ones. With Meta Pseudo Labels, a teacher network makes up labels for a student
network, and learns from how well the student then does on the labeled
examples. On your own pictures the default is UDA: one network that learns its
own labels of pictures that it is sure of.

  metapl train RECIPE           train a classifier; it goes to a folder (RUN)
  metapl noisy-student RECIPE   train students on the labels of their teachers
  metapl ablate RECIPE          compare the modes: which gradient to take
  metapl evaluate RUN           measure it on the test set again
  metapl predict RUN FILES...   let it classify your pictures
  metapl compare RUN RUN...     put runs side by side, and test if they differ
  metapl runs [FOLDER]          list the runs below runs/: accuracy, date, state
  metapl report RUN             write all there is to see of it as one web page
  metapl attribute RUN          say which labeled pictures help, and which harm
                                (or of a RECIPE, without a run)
  metapl export RUN --out DIR   write it for others: a program, weights, a card
  metapl label RUN DIR          store its class probabilities of many pictures
  metapl labels DO STORE        look at such a store (stats), or select from it

For example, with the handwritten digits that come with scikit-learn, of which
two in each class are labeled (a minute on a laptop, no graphics card):

  metapl train digits --out runs/first
  metapl predict runs/first my_digit.png another.png
  metapl train digits --compare --seeds 0-4 --out runs/compared

With pictures of your own, a few of them in one folder a class:

  metapl train images --labeled few/ --unlabeled many/ --test held_out/

With pictures some of which are in the folder of a wrong class:

  metapl train noisy --labeled sorted_badly/ --clean few/

With --compare, each recipe trains the same without the teacher's feedback,
and by other methods, and says whether the feedback helped.

Each command says more with --help: metapl train digits --help.
metapl --version says which metapl this is; metapl --print-completion SHELL
completes commands and flags in bash, zsh or fish.
"""

RECIPES_HELP = """\
metapl train RECIPE, with RECIPE one of:

  digits                handwritten digits that come with scikit-learn
  images                your own pictures, in folders
  noisy                 your own pictures, some of them in the wrong folder

Each says more with --help: metapl train digits --help.
"""

NOISY_STUDENT_HELP = """\
metapl noisy-student RECIPE trains a teacher on the labeled examples, and then
students, one after another: each learns with noise from the labels that the
network before it gives the unlabeled examples. RECIPE is one of:

{recipes}
  metapl noisy-student digits --rounds 3 --out DIR
  metapl noisy-student digits --networks 32x32 64x64

Each says more with --help: metapl noisy-student digits --help.
"""

ABLATE_HELP = """\
metapl ablate RECIPE compares the ways to find the teacher's gradient, on the
networks and data of a recipe: how far each is from the exact gradient, and
what it costs. It ends with the mode to take. RECIPE is one of:

{recipes}
For networks of your own: metapl ablate --factory MODULE:FUNCTION.

  metapl ablate digits --steps 200 --out DIR
  metapl ablate digits --steps 200 --stability --train-steps 500

Each says more with --help: metapl ablate digits --help.
"""

LABELS_HELP = """\
metapl labels DO STORE, with DO one of:

  stats   what is in a store that metapl label wrote: classes, confidence
  select  write a store of some of its examples: by confidence, balanced

Each says more with --help: metapl labels select --help.
"""

# Of commands whose first word is a choice: help, in which ``{recipes}`` stands for lines of ``RECIPES_HELP``; what is
# chosen; and an end of the command line.
CHOICES = {
    "train": (RECIPES_HELP, "recipe", "digits"),
    "noisy-student": (NOISY_STUDENT_HELP, "recipe", "digits"),
    "ablate": (ABLATE_HELP, "recipe", "digits --steps 100; or --factory module:function, for networks of your own"),
    "labels": (LABELS_HELP, "action", "stats STORE"),
}

# What is said of words that meant something before.
GONE = {
    "train two-moons": "the two moons are an example now: python examples/two_moons.py --help",
    "finetune": "train again with --finetune-steps",
    "plan": "python examples/plan.py --help",
    "shards": "tar --sort=name --mtime=@0 -cf, and sha256sum",
    "train torchvision": "metapl train images, or python examples/protocols.py --help",
    "noisy-student imagenet": "python examples/noisy_student_imagenet.py --help",
}
_PROTOCOLS = ("cifar10-4k", "cifar10-4k-paper", "svhn-1k", "imagenet-10pct", "imagenet-10pct-paper")
GONE |= {f"train {name}": f"python examples/protocols.py {name}" for name in _PROTOCOLS}

# What takes less memory, by a command's first word; the others have no flag for it.
_MORE = "raise --accumulate, or take --precision bfloat16"
LESS_MEMORY = {
    "train": LESS,
    "noisy-student": f"lower --labeled-batch, --ratio, --image-size or --num-workers, {_MORE}",
    "ablate": f"lower --labeled-batch, --unlabeled-batch or --image-size, {_MORE}",
    "label": "lower --batch or --num-workers",
    "attribute": "lower --batch, or give fewer pictures by --val",
}

SHELLS = ("bash", "zsh", "fish")


def found(command: str, words: Sequence[str] = ()) -> Any:
    """The class of a command, or its classes by their first word."""
    flag, other = BY_FLAG.get(command, (None, ""))
    place = other if flag in {word.partition("=")[0] for word in words} else COMMANDS[command]
    named, of_name = BY_WORD.get(command, ((), ""))
    place = of_name if words and words[0] in named else place
    module, _, name = place.partition(".")
    return getattr(import_module(f"metapl.apps.commands.{module}"), name)


def help_of(command: str) -> str:
    text, known = CHOICES[command][0], found(command)
    lines = [line for line in RECIPES_HELP.splitlines(keepends=True) if line.split()[:1] and line.split()[0] in known]
    return text.format(recipes="".join(line for line in lines if f"\n  {line.split()[0]} " not in text))


def print_completion(given: Sequence[str]) -> int:
    """``metapl --print-completion SHELL``: tyro writes the script by which a shell completes commands and flags."""
    import tyro

    from metapl.apps.commands.parse import CONFIG, REGISTRY

    if len(given) != 1 or given[0] not in SHELLS:
        raise MetaplError(
            f"--print-completion was given {' '.join(given) or 'no shell'}; expected one of {', '.join(SHELLS)}, "
            "such as: metapl --print-completion bash."
        )

    def one_of(kinds: Mapping[str, Any]) -> Any:
        return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007  # made from a list

    def every(kind: Any, program: str) -> Any:
        """The command with the flags of all its methods."""
        own = kind.given(("--compare",), program)[0]
        if not hasattr(kind, "offered"):
            return own
        made = [kind.given(("--compare", "--method", name), program)[0] for name in kind.offered()]
        settings = [one.__dataclass_fields__["settings"].default for one in made]
        bases = tuple({type(one): one for one in settings})
        of = make_dataclass("Every", [], bases=bases, namespace={"__post_init__": lambda self: None}, frozen=True)
        default = of(**{name: value for one in reversed(settings) for name, value in vars(one).items()})
        flags = ("settings", Annotated[of, tyro.conf.arg(name="")], field(default=default))
        return make_dataclass(own.__name__, [flags], bases=(own,), frozen=True, kw_only=True)

    def taken(command: str) -> Any:
        def chosen(choice: Any) -> None: ...

        if command not in CHOICES:
            return found(command)
        kinds = {name: every(kind, f"metapl {command} {name}") for name, kind in found(command).items()}
        chosen.__annotations__["choice"] = Annotated[one_of(kinds), tyro.conf.arg(name="")]
        return chosen

    try:
        tyro.cli(
            one_of({name: taken(name) for name in COMMANDS}),
            prog="metapl",
            args=["--tyro-write-completion", given[0], "-"],
            config=(*CONFIG, tyro.conf.OmitSubcommandPrefixes),
            registry=REGISTRY,
        )
    except SystemExit as end:  # tyro prints the script and ends
        return int(end.code or 0)
    raise RuntimeError("tyro printed no script")
