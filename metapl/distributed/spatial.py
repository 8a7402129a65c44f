r"""Images cut along their width: each process runs a convolutional network on its columns of every image.

A convolution reads a few columns beside the ones that it computes, the halo, which the neighbors send; batch and group
norms take their statistics, and global pooling its mean, over the columns of all processes. What comes after the
pooling is small, and every process computes it whole. The paper trains EfficientNet-L2 in this layout.

With output column j of a convolution at input columns :math:`js - p, \dots, js - p + d(k - 1)` (kernel k, stride s,
padding p, dilation d), a process with W columns needs p columns on the left and d(k − 1) − p − s + 1 on the right.

DTensor's own sharding of convolutions is not used: it drops the halo without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from metapl.distributed.dropout import KeyedDropout
from metapl.errors import MetaplError
from metapl.execution.numerics import wide
from metapl.execution.ranks import Columns, columns_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Whole images (B, C, H, W), or these and what else a network takes with them, a row for each.
Example = Tensor | tuple[Tensor, ...]

FAINT = 1e-2  # a weight all of whose numbers are smaller counts as about zero


def split_width(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's columns of images (..., W), which are whole and the same on every process of the group."""
    width, size = x.shape[-1], group.size()
    if width % size:
        raise MetaplError(f"images of width {width} cannot be cut for {size} processes; expected a multiple of {size}.")
    return x.chunk(size, dim=-1)[group.rank()]


def takes_whole_images(network: nn.Module) -> None:
    """Let a network that is split take whole images, the same in every process, and cut out its own columns; what else
    it takes stays as it is."""
    columns: Any = columns_of(network)
    network.register_forward_pre_hook(lambda _, inputs: (split_width(inputs[0], columns.group), *inputs[1:]))


def spatial(module: ModuleT, group: dist.ProcessGroup, example: Example) -> ModuleT:
    """Let a convolutional network run on this process's columns of images, of which those that share them are in the
    group from left to right, with default generators seeded alike.

    The parameters, the buffers and their names stay; layers are replaced in place, and the network is then run on the
    ``example``, whole images (B, C, H, W), and on their parts, in evaluation and, for more than one image, in training:
    what its own code does with the columns, such as ``x.mean((2, 3))``, cannot be seen otherwise. Outputs are whole and
    the same on every process, and the *mean* of the gradients over these is that on whole images.

    Cost: a message to each neighbor for each convolution and pooling wider than its stride, two sums of a vector for
    each norm, and one for the global pooling.

    Raises:
        MetaplError: a layer that cannot get the columns that it needs, by name; columns that a stride does not divide,
            or fewer than a halo; other outputs on the parts than on the whole. The network is then as it was.
    """
    if columns_of(module) is not None:
        raise MetaplError("spatial was given a network whose images are split already; expected a whole one.")
    if type(module) in _FORMS:
        raise MetaplError(f"spatial was given a {type(module).__name__} alone; expected a network around it.")
    given = (example,) if isinstance(example, Tensor) else example
    with torch.no_grad():
        # Other values for weights that are about zero, as at the start of many heads and branches: what they are
        # multiplied with would not be seen in the outputs.
        draw, weights = torch.Generator().manual_seed(0), {}
        for name, p in module.named_parameters():
            if p.is_floating_point() and p.numel() and p.abs().max() < FAINT:
                values = torch.rand(p.shape, generator=draw, dtype=torch.float64) + 0.5
                weights[name] = (values / math.sqrt(max(1, p.numel() // len(p)) if p.ndim else 1)).to(p)
        kept = _of_whole_rows(module, given, weights)
        layers = [(path, layer) for path, layer in module.named_modules(remove_duplicate=False) if layer not in kept]
        made = {layer: split_layer(path, layer, Columns(group)) for path, layer in reversed(layers)}
        # Of a single example, batch norm has no statistics.
        modes = (False, True)[: len(given[0])]
        expected = [_run(module, given, weights, training) for training in modes]
        try:
            for path, layer in layers:
                if (new := made[layer]) is not None:
                    module.set_submodule(path, new)
            parts = (split_width(given[0], group), *given[1:])
            for training, whole in zip(modes, expected, strict=True):
                try:
                    found = _run(module, parts, weights, training)
                except dist.DistError:
                    raise
                except RuntimeError as error:
                    raise MetaplError(f"{_OTHER_OUTPUTS} It failed with: {error}") from error
                same = found.shape == whole.shape
                if same:
                    found, whole = wide(found), wide(whole)
                    # Outputs have much in common for all images, such as biases; errors are measured by what they have
                    # not. Batch norms of few numbers enlarge rounding.
                    spread = (whole - whole.mean(0)).norm() if len(whole) > 1 else whole.norm()
                    share, rounding = (1e-6, 1e-12) if whole.dtype == torch.float64 else (1e-3, 1e-5)
                    most = (20 * share if training else share) * spread + rounding * whole.norm()
                    same = bool((found - whole).norm() <= most)
                if sum_over(torch.tensor(float(not same), device=found.device), group):
                    raise MetaplError(_DRAWN_OTHERWISE if training else _OTHER_OUTPUTS)
        except BaseException:
            for path, layer in layers:
                if made[layer] is not None:
                    module.set_submodule(path, layer)
            raise
    vars(module)["split_columns"] = Columns(group)
    return module


def _run(module: nn.Module, inputs: tuple[Tensor, ...], weights: dict[str, Tensor], training: bool) -> Tensor:
    """Outputs in training or evaluation, on draws that are the same for whole images and parts; nothing is moved."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            buffers = {name: t.clone() for name, t in module.named_buffers()}
            outputs: Tensor = functional_call(module, weights | buffers, inputs)
            return outputs
    finally:
        for part, mode in before:
            part.training = mode


def _of_whole_rows(module: nn.Module, example: tuple[Tensor, ...], weights: dict[str, Tensor]) -> set[nn.Module]:
    """The layers that run after the global pooling alone, on what every process has whole; they stay as they are."""
    seen: dict[nn.Module, bool] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        rows = all(len(t) == len(example[0]) and (t.ndim == 2 or t.shape[-1] == 1) for t in given if t.ndim)
        seen[layer] = seen.get(layer, True) and rows and bool(given)

    # What holds layers is told by these.
    leaves = [part for part in module.modules() if not list(part.children())]
    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in leaves]
    try:
        _run(module, example, weights, training=False)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shapes, why = ", ".join(str(tuple(t.shape)) for t in example), str(error).partition("\n")[0]
        raise MetaplError(
            f"the {type(module).__name__} cannot take the example of shape {shapes}: {why} Expected what it is given "
            "in training, as a tuple where that is more than images. A teacher that takes no images, and has nothing "
            f"to cut: shard(teacher, Mesh(replicate={dist.get_world_size()}))."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {layer for layer, whole in seen.items() if whole}


_DRAWN_OTHERWISE = (
    "the network makes the outputs of whole images of the columns of its processes in evaluation and others in "
    "training: a layer, or its own code, draws for single pixels (torch.nn.RReLU, AlphaDropout, F.dropout) or takes "
    "statistics there. Expected nn.Dropout2d, metapl.distributed.keyed_dropout(network), or Mesh(shard=...) instead."
)

_OTHER_OUTPUTS = (
    "the network makes other outputs of the columns of its processes than of whole images: its own code reads across "
    "the width (x.mean((2, 3)), flatten). Expected layers, as torch.nn.AdaptiveAvgPool2d(1), or Mesh(shard=...)."
)


def split_layer(name: str, layer: nn.Module, columns: Columns) -> nn.Module | None:
    """What takes a layer's place, with the same tensors and settings; None for one that works as it is."""
    if isinstance(layer, KeyedDropout):  # by the places in whole images
        keyed = KeyedDropout(layer.p, layer.share, layer.shared_from, layer.scaled)
        if layer.shared_from is None:
            keyed.part, keyed.parts, keyed.of_images = columns.group.rank(), columns.group.size(), True
        return keyed
    form, fits = _FORMS.get(type(layer), (None, None))
    drops_alike = isinstance(layer, nn.Dropout) and layer.p > 0  # in every process
    if form is None and not isinstance(layer, _WITHOUT_FORM) and not drops_alike:
        return None
    if form is None or (fits is not None and not fits(layer)):
        raise MetaplError(
            f"{name or 'the module'}, {type(layer).__name__}({layer.extra_repr()}), has no form for images cut along "
            "their width; expected Conv2d padded by zeros, MaxPool2d and AvgPool2d without dilation and ceil_mode, "
            "AdaptiveAvgPool2d(1), BatchNorm2d, GroupNorm, layers that work on each pixel, and of dropout nn.Dropout2d "
            "or metapl.distributed.keyed_dropout(network). Share the network with Mesh(shard=...) instead."
        )
    made = form.__new__(form)
    made.__dict__.update(layer.__dict__, columns=columns, name=name)
    if isinstance(made, _Window):
        height, width = _pair(layer.padding)
        made.__dict__.update(padding=(height, 0), beside=width)
    return made


class _Window:
    """A layer whose windows reach into the neighbors' columns: these are put beside its own, in place of padding."""

    columns: Columns
    name: str
    beside: int  # its padding along the width; that of the layer is 0
    fill: float = 0.0  # of padding

    def forward(self, x: Tensor) -> Tensor:
        group, width, padding = self.columns.group, x.shape[-1], self.beside
        kernel, stride, dilation = (_pair(getattr(self, v, 1))[1] for v in ("kernel_size", "stride", "dilation"))
        left, right = padding, dilation * (kernel - 1) - padding - stride + 1
        whole, size = width * group.size(), group.size()
        if width % stride or (whole + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 != whole // stride:
            raise MetaplError(
                f"{self.name} (kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}) makes of "
                f"{whole} columns a number that {size} processes with {width} each do not share evenly; expected a "
                "width of the images that every stride divides on every process, and paddings that keep it: a larger "
                "image, or fewer processes."
            )
        if max(left, right) > width:
            raise MetaplError(
                f"{self.name} needs {max(left, right)} columns beside its own, and each process has {width}; expected "
                "larger images, or fewer processes."
            )
        x = with_halo(x, left, max(right, 0), group)
        if right < 0:  # columns that no window reads; they may still be a neighbor's halo
            x = x[..., :right]
        edges = left * (group.rank() == 0), max(right, 0) * (group.rank() == size - 1)
        if self.fill and any(edges):
            x = F.pad(x[..., edges[0] : x.shape[-1] - edges[1]], edges, value=self.fill)
        result: Tensor = super().forward(x)  # type: ignore[misc]  # of the layer beside this class
        return result


class SpatialConv2d(_Window, nn.Conv2d):
    """A convolution of this process's columns."""


class SpatialMaxPool2d(_Window, nn.MaxPool2d):
    """The greatest values of windows."""

    fill = -torch.inf


class SpatialAvgPool2d(_Window, nn.AvgPool2d):
    """The means of windows."""


class SpatialGlobalPool2d(nn.AdaptiveAvgPool2d):
    """The mean over all columns of all processes."""

    columns: Columns

    def forward(self, x: Tensor) -> Tensor:
        return sum_over(x.mean(dim=(-2, -1), keepdim=True), self.columns.group) / self.columns.group.size()


class SpatialBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the statistics of the whole images in this group's share of the batch."""

    columns: Columns

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        y, mean, variance, n = _standardized(x, (0, 2, 3), self.eps, self.columns)
        if self.training and self.track_running_stats and self.running_mean is not None:
            held: dict[str, Any] = self._buffers
            with torch.no_grad():  # as PyTorch does: by the unbiased variance
                held["num_batches_tracked"].add_(1)
                share = 1 / float(held["num_batches_tracked"]) if self.momentum is None else self.momentum
                held["running_mean"].lerp_(mean.detach().flatten(), share)
                held["running_var"].lerp_(variance.detach().flatten() * (n / max(n - 1, 1)), share)
        return _scaled(self, y).to(x.dtype)


class SpatialGroupNorm(nn.GroupNorm):
    """Group norm by the statistics of all columns of an image."""

    columns: Columns

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.num_groups, -1))
        y, *_ = _standardized(grouped, (2, 3, 4), self.eps, self.columns)
        return _scaled(self, y.flatten(1, 2)).to(x.dtype)


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float, columns: Columns) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values by their mean and variance over these dimensions and all processes; both, and of how many they are."""
    x = wide(x)  # sums over so many pixels are not taken in half precision
    n = math.prod(x.shape[dim] for dim in dims) * columns.group.size()
    mean = sum_over(x.sum(dims, keepdim=True), columns.group) / n
    centered = x - mean
    variance = sum_over(centered.square().sum(dims, keepdim=True), columns.group) / n
    return centered * (variance + eps).rsqrt(), mean, variance, n


def _scaled(norm: Any, y: Tensor) -> Tensor:
    y = y if norm.weight is None else y * norm.weight[:, None, None]
    return y if norm.bias is None else y + norm.bias[:, None, None]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_FORMS: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any], bool] | None]] = {
    nn.Conv2d: (SpatialConv2d, lambda c: c.padding_mode == "zeros" and not isinstance(c.padding, str)),
    nn.MaxPool2d: (
        SpatialMaxPool2d,
        lambda p: not p.ceil_mode and _pair(p.dilation) == (1, 1) and not p.return_indices,
    ),
    nn.AvgPool2d: (SpatialAvgPool2d, lambda p: not p.ceil_mode and (p.count_include_pad or not _pair(p.padding)[1])),
    nn.AdaptiveAvgPool2d: (SpatialGlobalPool2d, lambda p: p.output_size in (1, (1, 1))),
    nn.BatchNorm2d: (SpatialBatchNorm2d, None),
    nn.GroupNorm: (SpatialGroupNorm, None),
}

_WITHOUT_FORM = (
    nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.LayerNorm, nn.Upsample,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.batchnorm._NormBase,
    nn.MultiheadAttention, nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip


# PyTorch's own collectives drop or skip the tangent of a dual number without a word, so every exchange in a network's
# forward pass is one of these. Each is linear: its derivative along a direction is the exchange of the direction, and
# its backward pass is the adjoint exchange, which is one of this kind again.


def sum_over(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the processes of a group, the same on every one.

    The backward pass sums the gradients too, so that the *mean* of the processes' parameter gradients is the gradient
    of one process with everything.
    """
    summed = partial(_summed, group=group)
    result: Tensor = Exchange.apply(t, summed, summed)
    return result


def with_halo(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    """This process's columns of images, (..., W), and ``left`` and ``right`` columns of its neighbors beside them, at
    most W of each; there are zeros at the images' edges."""
    if not left and not right:
        return t
    sides: dict[str, Any] = {"left": left, "right": right, "group": group}
    result: Tensor = Exchange.apply(t, partial(_gathered, **sides), partial(_returned, **sides))
    return result


class Exchange(torch.autograd.Function):
    """A linear exchange of a tensor, given with its adjoint."""

    @staticmethod
    def forward(t: Tensor, exchange: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        return exchange(t.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.exchange, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Exchange.apply(gradient, ctx.adjoint, ctx.exchange), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        exchanged: Tensor = ctx.exchange(tangent.detach())
        return exchanged


def _summed(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    of_left, of_right = _swapped(t[..., :right], t[..., t.shape[-1] - left :], group)
    return torch.cat([of_left, t, of_right], dim=-1)


def _returned(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    """The adjoint: the columns beside a process's own go back to the neighbors that they are of, who add them."""
    width = t.shape[-1] - left - right
    own = t[..., left : left + width].clone()
    # What a process holds of its left neighbor are that one's last columns.
    of_left, of_right = _swapped(t[..., :left], t[..., left + width :], group)
    own[..., :right] += of_left
    own[..., width - left :] += of_right
    return own


def _swapped(to_left: Tensor, to_right: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Send columns to both neighbors; what the left one sends to its right, and the other to its left, of which zeros
    stand where there is none."""
    # Every process sends as many columns as any other.
    received = to_right.new_zeros(to_right.shape), to_left.new_zeros(to_left.shape)
    operations = []
    for there, sent, buffer in zip((group.rank() - 1, group.rank() + 1), (to_left, to_right), received, strict=True):
        if 0 <= there < group.size():
            peer = dist.get_global_rank(group, there)
            operations += [dist.P2POp(dist.isend, sent.contiguous(), peer, group)] * bool(sent.numel())
            operations += [dist.P2POp(dist.irecv, buffer, peer, group)] * bool(buffer.numel())
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received
