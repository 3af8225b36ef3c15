"""The optimisers of a training."""

import torch
from torch import nn


def make(model: nn.Module, settings) -> list[torch.optim.Optimizer]:
    """The optimiser of the settings, its state allocated, and behind it that of trained word vectors, if it is another.

    settings: a train.Training. ValueError for a rate of word vectors where none are trained.
    """
    apart = settings.embedding_learning_rate
    words = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and apart is not None]
    if apart is not None and not words:
        raise ValueError(
            f"embedding_learning_rate is {apart}, but network '{settings.network}' trains no word vectors."
        )
    rest = [p for p in model.parameters() if not any(p is word for word in words)]
    cuda, common = rest[0].is_cuda, {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        main = torch.optim.SGD(rest, momentum=settings.momentum, fused=cuda or None, **common)
        started = {"momentum_buffer": torch.zeros_like}
    elif settings.optimizer == "adam":
        main = torch.optim.Adam(rest, capturable=cuda, **common)
        started = {"step": lambda p: torch.zeros((), device=p.device if cuda else None)}
        started |= dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like)
    else:
        main, started = torch.optim.Adagrad(rest, **common), {}
    for parameter in rest:  # as after a step without gradient: what is saved has one form at any time
        main.state[parameter] |= {kind: begin(parameter.detach()) for kind, begin in started.items()}
    return [main, *([torch.optim.SGD(words, lr=apart)] if words else [])]
