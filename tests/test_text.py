"""The text networks, and how trees get to them."""

import numpy as np
import pytest
import torch
from helpers import make_loss, protocol

from focalcal import feed, networks, train
from focalcal.text import RECEPTIVE_FIELD, GlobalPoolCNN, TreeLSTM

CPU = torch.device("cpu")


def words(count, seed=0, dimensions=100):
    table = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    table[0] = 0
    return table


def documents(lengths, longest, seed=0):
    """Tokens padded in front."""
    rng, tokens = np.random.default_rng(seed), np.zeros((len(lengths), longest), np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[longest - length :] = rng.integers(1, 50, length)
    return torch.from_numpy(tokens)


def test_published_sizes():
    cnn, lstm = (networks.make(name, k, words(30), 0) for name, k in (("global_pool_cnn", 20), ("tree_lstm", 3)))
    assert sum(p.numel() for p in cnn.parameters()) == 247_316
    assert sum(p.numel() for n, p in lstm.named_parameters() if n != "embedding.weight") == 211_953
    assert networks.head(cnn).out_features == 20 and networks.head(lstm).out_features == 3
    assert "embedding" not in cnn.state_dict()  # frozen: it is in prepared.npz
    for name, of in (("global_pool_cnn", 3), ("small_resnet", words(30))):
        with pytest.raises(ValueError, match=f"Network '{name}' reads .*, but the study's data are"):
            networks.make(name, 2, of, 0)


def test_without_most_of_the_padding_the_features_are_the_same():
    """Lengths from nothing to all of it, unsorted, in more than one group."""
    model = GlobalPoolCNN(20, words(50)).eval()
    tokens = documents([0, 1, 200, 7, 380, 399, 400, 379, 21, 30, *range(40, 140, 3)], longest=400)
    with torch.no_grad():
        padded, shortened = model.features(tokens), model.shortened(tokens)
    assert (padded - shortened).abs().max() < 1e-6
    seen = model.features(tokens[1:2, -RECEPTIVE_FIELD - 1 :])
    assert torch.allclose(seen, padded[1:2], atol=1e-6)


def test_documents_shorter_than_a_feature():
    with pytest.raises(ValueError, match="Documents of 20 positions; the network needs 21 or more"):
        GlobalPoolCNN(20, words(50)).features(documents([3], longest=20))


def test_a_feature_sees_21_positions():
    model, tokens = GlobalPoolCNN(20, words(50)).eval(), documents([60], longest=60)
    first, second, third = model.convolutions
    x = torch.nn.functional.embedding(tokens, model.embedding).transpose(1, 2).requires_grad_()
    conv1d = torch.nn.functional.conv1d  # as the papers have it
    once = torch.nn.functional.max_pool1d(conv1d(x, first.weight[:, :, 0], first.bias).relu(), 5, stride=1)
    twice = torch.nn.functional.max_pool1d(conv1d(once, second.weight[:, :, 0], second.bias).relu(), 5, stride=1)
    thrice = conv1d(twice, third.weight[:, :, 0], third.bias).relu()
    assert torch.allclose(thrice.amax(dim=2), model.features(tokens), atol=1e-6)
    thrice[0, :, 20].sum().backward()
    touched = x.grad.abs().sum(dim=(0, 1)).nonzero()[:, 0]
    assert touched.min() >= 20 and touched.max() <= 20 + RECEPTIVE_FIELD - 1


TREES = {  # (a b), and ((c (a a)) b), and d alone
    "words": [0, 1, -1, 2, 0, 0, -1, -1, 1, -1, 3],
    "left": [-1, -1, 0, -1, -1, -1, 1, 0, -1, 4, -1],
    "right": [-1, -1, 1, -1, -1, -1, 2, 3, -1, 5, -1],
    "node_labels": [0, 1, 2, 0, 1, 2, 1, 0, 2, 1, 0],
    "first": [0, 3, 10, 11],
}


def trees(masked=()):
    return feed.Trees(*(np.array(TREES[name]) for name in TREES), CPU, masked)


def test_trees_by_levels():
    split = trees()
    assert len(split) == 3 and split.labels.tolist() == [2, 1, 0]
    batch, labels = split.training_batch(torch.tensor([1, 0]))
    assert batch.words.tolist() == [2, 0, 0, 1, 0, 1] and batch.levels == [2, 1, 1]
    # leaves 0-5, then (a a) = 6, (a b) = 7, (c (a a)) = 8, the whole = 9
    assert (batch.left.tolist(), batch.right.tolist()) == ([1, 4, 0, 8], [2, 5, 6, 3])
    assert batch.roots.tolist() == [9, 7] and labels.tolist() == [0, 1, 2, 2, 0, 1, 1, 2, 0, 1]
    assert split.batch(slice(2, 3)).levels == [] and split.batch(slice(2, 3)).roots.tolist() == [0]


def test_tree_lstm_against_a_recursion():
    """Node by node, as the published code goes through a tree."""
    model, split = TreeLSTM(3, words(4, dimensions=5), memory=6).double().eval(), trees()

    def node(tree, i):
        start = TREES["first"][tree]
        if TREES["words"][start + i] >= 0:
            x = model.embedding.weight[TREES["words"][start + i]]
            cell = model.leaf_cell(x)
            return cell, torch.sigmoid(model.leaf_gate(x)) * torch.tanh(cell)
        (cl, hl), (cr, hr) = node(tree, TREES["left"][start + i]), node(tree, TREES["right"][start + i])
        i, fl, fr, u = (model.from_left(hl) + model.from_right(hr)).split(6)
        cell = torch.sigmoid(i) * torch.tanh(u) + torch.sigmoid(fl) * cl + torch.sigmoid(fr) * cr
        return cell, torch.tanh(cell)

    logits = model(split.batch(slice(None)))
    expected = torch.stack([model.head(node(tree, size)[1]) for tree, size in enumerate((2, 6, 0))])
    torch.testing.assert_close(logits, expected)
    assert model.train()(split.batch(slice(None))).shape == (11, 3)  # all nodes


def prepared(kind, seed=0):
    """Small documents or trees whose class is in their last words, or their first leaf."""
    rng, arrays = np.random.default_rng(seed), {"embedding": words(30, dimensions=20), "classes": np.array(list("abc"))}
    for split, count in (("train", 60), ("val", 40), ("test", 40)):
        labels = rng.integers(0, 3, count)
        if kind == "documents":
            tokens = rng.integers(4, 30, (count, 40))
            tokens[:, -20:] = 1 + labels[:, None]
            arrays |= {f"{split}_tokens": tokens, f"{split}_labels": labels}
        else:
            leaves = np.stack([1 + labels, rng.integers(4, 30, count), np.full(count, -1)], axis=1)
            arrays[f"{split}_words"] = leaves.ravel()
            arrays[f"{split}_left"], arrays[f"{split}_right"] = np.tile([-1, -1, 0], count), np.tile([-1, -1, 1], count)
            arrays[f"{split}_node_labels"] = np.stack([labels, np.full(count, 1), labels], axis=1).ravel()
            arrays[f"{split}_first"] = np.arange(0, 3 * count + 1, 3)
    return arrays | ({"masked": np.array([1])} if kind == "trees" else {})


PROTOCOLS = {
    "documents": {"network": "global_pool_cnn", "optimizer": "adam", "learning_rate": 3e-3, "batch_size": 16},
    "trees": {"network": "tree_lstm", "optimizer": "adagrad", "learning_rate": 0.05, "batch_size": 25},
}
PROTOCOLS["documents"] |= {"reduction": "mean"}
PROTOCOLS["trees"] |= {"reduction": "per_document", "embedding_learning_rate": 0.1}
COMMON = {"epochs": 4, "milestones": [], "clip": None, "augment": False, "select": "best", "drop_last": True}


def new_run(kind, arrays, loss="cross_entropy", **changes):
    settings = protocol(**COMMON | PROTOCOLS[kind] | {"weight_decay": 0.0} | changes)
    return train.Run(networks.make(settings.network, 3, arrays["embedding"], 0), make_loss(loss), settings)


@pytest.mark.parametrize("kind", ["documents", "trees"])
@pytest.mark.parametrize("loss", ["cross_entropy", "adafocal", "mmce"])
def test_a_loss_trains_on_text_and_repeats_whatever_is_beside_it(kind, loss):
    """Dropout included: trained with another loss, the same bits come out."""
    arrays = prepared(kind)
    data = feed.splits(arrays, CPU)
    alone, again, other = (new_run(kind, arrays, name, epochs=2) for name in (loss, loss, "brier"))
    list(train.train(alone, data, 0))
    list(train.train_together([other, again], data, 0))
    assert repr(alone.history) == repr(again.history)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in alone.tensors().items())


@pytest.mark.parametrize("kind", ["documents", "trees"])
def test_an_interrupted_training_that_keeps_its_best_epoch_ends_the_same(kind):
    arrays = prepared(kind)
    data = feed.splits(arrays, CPU)
    whole = new_run(kind, arrays, epochs=6)
    list(train.train(whole, data, 0))
    first, second = new_run(kind, arrays, epochs=6), new_run(kind, arrays, epochs=6)
    rows = train.train(first, data, 0)
    for _ in range(4):
        next(rows)
    second.restore(first.state(), list(first.history))
    list(train.train(second, data, 0))
    assert repr(second.history) == repr(whole.history)
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in second.tensors().items())


@pytest.mark.parametrize("kind", ["documents", "trees"])
def test_the_first_step_is_that_of_pytorchs_own_optimiser(kind):
    arrays = prepared(kind)
    data, run = feed.splits(arrays, CPU), new_run(kind, arrays, epochs=1, weight_decay=0.01, batch_size=60)
    reference = new_run(kind, arrays).model.train()
    inputs, labels = data["train"].training_batch(feed.epoch_randomness(0, 1, 60)[0])
    torch.manual_seed(0)  # of dropout in the first step of seed 0
    total = torch.nn.functional.cross_entropy(reference(inputs), labels, reduction="sum")
    (total / 60).backward()  # 60 documents, or 60 trees of three nodes
    with torch.no_grad():
        for name, p in reference.named_parameters():
            slope = p.grad + 0.01 * p
            if name == "embedding.weight":
                p -= 0.1 * p.grad
            elif kind == "documents":  # Adam's first step is the slope's sign
                p -= 3e-3 * slope / (slope.abs() + 1e-8)
            else:
                p -= 0.05 * slope / (slope.abs() + 1e-10)
    list(train.train(run, data, 0))
    for (name, p), expected in zip(run.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["documents", "trees"])
def test_text_is_learnt(kind):
    arrays = prepared(kind)
    run = new_run(kind, arrays, epochs=6)
    list(train.train(run, feed.splits(arrays, CPU), 0))
    assert run.history[-1]["test_nll"] < 0.1  # chance: 1.1


def test_a_masked_class_is_trained_and_never_predicted():
    arrays = prepared("trees")
    run = new_run("trees", arrays, epochs=15)
    list(train.train(run, feed.splits(arrays, CPU), 0))
    logits, labels, masked = train.scored(run.model, feed.splits(arrays, CPU)["test"])
    assert masked == (1,) and (logits.argmax(axis=1) == 1).mean() > 0.2
    wrong = (np.where(logits[:, 0] > logits[:, 2], 0, 2) != labels).mean()
    assert run.history[run.selected - 1]["test_error"] == pytest.approx(wrong)
