"""Which layer of a network a parameter belongs to, counted from the input, and training the last of them alone."""

from __future__ import annotations

from torch import nn

from tes.errors import ModelError


def layer_of(network: nn.Module) -> dict[str, int]:
    """Return the layer of every trainable parameter by its name: 0 next to the input, and none left out.

    A timm network says so itself (`group_matcher`: stem, then block by block). Of any other, the top-level children
    that have something to train are the layers, in the order in which they were registered, taken to be that from input
    to output; parameters of the network itself (a class token) belong to the first. A lone child is looked into: it is
    mostly a wrapped network.

    Raises:
        ModelError: The network's own `group_matcher` fails.
    """
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layers = {name: layer for name, layer in _all_layers(network).items() if name in trained}
    number = {layer: place for place, layer in enumerate(sorted(set(layers.values())))}
    return {name: number[layer] for name, layer in layers.items()}


def count_layers(network: nn.Module) -> int:
    """Return how many layers of a network have something to train; see `layer_of`."""
    return 1 + max(layer_of(network).values(), default=-1)


def freeze_all_but_last(network: nn.Module, num_last: int) -> None:
    """Take all layers but the last `num_last` out of training.

    What lies before the first trained layer then keeps no activation and has no backward pass: autograd needs to be
    told nothing else. Its outputs are computed at each step, and not once for all: they belong to an augmented image,
    which comes but once.

    Raises:
        ModelError: As `layer_of`.
    """
    first = count_layers(network) - num_last
    layers = layer_of(network)
    for name, parameter in network.named_parameters():
        if name in layers and layers[name] < first:
            parameter.requires_grad_(False)


def frozen_modules(network: nn.Module) -> list[str]:
    """Return the names of the modules that have parameters, none of them in training.

    In train mode they would still change: batch norms their statistics, dropout what comes out.
    """
    return [
        name
        for name, module in network.named_modules()
        if any(True for _ in module.parameters()) and not _is_trained(module)
    ]


def _all_layers(network: nn.Module) -> dict[str, int]:
    from timm.models import group_parameters

    if callable(getattr(network, "group_matcher", None)):
        try:
            return group_parameters(network, network.group_matcher(coarse=False), reverse=True)
        except Exception as problem:  # a module of the user's: anything can happen in it
            raise ModelError(
                f"`group_matcher` of {type(network).__name__} does not say which layer a weight belongs to"
                f" ({type(problem).__name__}: {problem}); mend it, or leave it out, and the top-level children are"
                " the layers."
            ) from problem
    layers = {name: 0 for name, _ in network.named_parameters(recurse=False)}
    children = [(name, child) for name, child in network.named_children() if _is_trained(child)]
    if len(children) == 1 and not layers:
        name, child = children[0]
        return {f"{name}.{below}": layer for below, layer in _all_layers(child).items()}
    for layer, (name, child) in enumerate(children):
        layers |= {f"{name}.{below}": layer for below, _ in child.named_parameters()}
    return layers


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Return a network's batch norms."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
