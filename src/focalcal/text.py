"""The text networks of Mukhoti et al. 2020, each made from (num_classes, embedding): a convolutional network on
documents, and a Tree-LSTM on parsed sentences. As in ``networks``, the classifier is the last ``nn.Linear``.

Read off the code published with the paper (branch nlp).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalcal.feed import TreeBatch
from focalcal.networks import Head

RECEPTIVE_FIELD = 21  # positions that one feature of the convolutional network sees: 3 convolutions, 2 pools, of 5 each
GROUP = 3000  # positions that go through the convolutions at once on a CPU; larger groups fall out of its cache


class GlobalPoolCNN(nn.Module):
    """Three convolutions of width 5 and 128 channels over frozen word vectors, then the maximum over all positions.

    embedding: float32 (words, D), row 0 zeros, for padding. 247,316 trained parameters for D = 100 and 20 classes.
    """

    def __init__(self, num_classes: int, embedding: Tensor):
        super().__init__()
        self.register_buffer("embedding", embedding, persistent=False)
        self.convolutions = nn.ModuleList([nn.Conv2d(width, 128, (1, 5)) for width in (embedding.shape[1], 128, 128)])
        self.hidden, self.dropout, self.head = nn.Linear(128, 128), nn.Dropout(0.3), Head(128, num_classes)

    def features(self, tokens: Tensor) -> Tensor:
        """(n, 128) from tokens (n, L); ValueError for L below RECEPTIVE_FIELD.

        As an image of one row, channels last, and with each ReLU after its pooling, which changes nothing and is
        quicker on a CPU.
        """
        if tokens.shape[1] < RECEPTIVE_FIELD:
            raise ValueError(f"Documents of {tokens.shape[1]} positions; the network needs {RECEPTIVE_FIELD} or more.")
        first, second, third = self.convolutions
        x = F.embedding(tokens, self.embedding)[:, None].permute(0, 3, 1, 2)  # (n, D, 1, L)
        x = F.relu(F.max_pool2d(first(x), (1, 5), stride=1))
        x = F.relu(F.max_pool2d(second(x), (1, 5), stride=1))
        return F.relu(third(x).amax(dim=(2, 3)))

    def shortened(self, tokens: Tensor) -> Tensor:
        """``features``, computed without most of the padding: the same to rounding, several times as fast on a CPU.

        Padding is zeros in front of a document, and features that see nothing else are all alike. So documents of
        similar length go together, cut to as many positions as the longest has, and RECEPTIVE_FIELD more.
        """
        longest = tokens.shape[1]
        lengths = (tokens != 0).sum(dim=1)
        order = lengths.argsort(stable=True)
        groups, widths = [[]], (lengths + RECEPTIVE_FIELD).clamp_max(longest).tolist()
        for document in order.tolist():
            if groups[-1] and widths[document] * (len(groups[-1]) + 1) > GROUP:
                groups.append([])
            groups[-1].append(document)
        parts = [self.features(tokens[group, -widths[group[-1]] :]) for group in groups]
        return torch.cat(parts)[order.argsort()]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, num_classes) of documents: tokens int64 (n, L), padded with zeros in front."""
        x = self.features(tokens) if tokens.is_cuda else self.shortened(tokens)
        return self.head(self.dropout(F.relu(self.hidden(x))))


class TreeLSTM(nn.Module):
    """The binary Tree-LSTM of Tai et al. 2015 as published: no output gate above the leaves, 150 cells.

    embedding: float32 (words, D), trained. In training the logits of all nodes of a feed.TreeBatch come out (nodes,
    num_classes), in its order, else those of its roots (trees, num_classes). 211,953 parameters besides the embedding
    for D = 100 and three classes.
    """

    def __init__(self, num_classes: int, embedding: Tensor, memory: int = 150):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
        self.leaf_cell, self.leaf_gate = (nn.Linear(embedding.shape[1], memory) for _ in range(2))
        self.from_left, self.from_right = (nn.Linear(memory, 4 * memory) for _ in range(2))  # i, f left, f right, u
        self.dropout, self.head = nn.Dropout(0.5), Head(memory, num_classes)

    def forward(self, trees: TreeBatch) -> Tensor:
        x = self.embedding(trees.words)
        cell = self.leaf_cell(x)
        state = self.leaf_gate(x).sigmoid() * cell.tanh()
        start = 0
        for count in trees.levels:
            left, right = trees.left[start : start + count], trees.right[start : start + count]
            gates = self.from_left(state[left]) + self.from_right(state[right])
            enter, keep_left, keep_right, update = gates.chunk(4, dim=1)
            new = enter.sigmoid() * update.tanh()
            new = new + keep_left.sigmoid() * cell[left] + keep_right.sigmoid() * cell[right]
            cell, state = torch.cat([cell, new]), torch.cat([state, new.tanh()])
            start += count
        state = state if self.training else state[trees.roots]
        return self.head(self.dropout(state))
