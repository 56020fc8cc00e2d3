"""``training_loss`` against the loss of a model's logits."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

from bitkernels import reference
from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.nn import BitLinear, FBILinear
from bitkernels.training import training_loss


def tiny(head=None, seed=0):
    torch.manual_seed(seed)
    model = BiMambaForCausalLM(
        CONFIGS["tiny"].replace(vocab_size=300, d_model=32, n_layer=1, tie_embeddings=head is None)
    )
    if head is not None:
        model.head = head(32, 300, bias=False)
    return model


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def assert_same(model, ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    for (name, _), a, b in zip(
        model.named_parameters(), gradients(model, ours), gradients(model, expected), strict=True
    ):
        # Sums in another order: single elements that cancel say nothing.
        assert_close(name, a, b)


@pytest.mark.parametrize("head", [None, nn.Linear, BitLinear])
def test_next_token(head):
    model, tokens = tiny(head), torch.randint(300, (3, 18))
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert_same(model, training_loss(model, tokens), expected)


@pytest.mark.parametrize("objective", ["cross_entropy", "kl", "next_token"])
def test_teachers(objective):
    """A model of this package, logits, and an object that holds them teach the same, and get no gradient."""
    model, teacher, tokens = tiny(), tiny(nn.Linear, seed=1), torch.randint(300, (2, 9))
    logits = teacher(tokens[:, :-1]).detach()
    arguments = {"targets": tokens[:, 1:]} if objective == "next_token" else {"teacher_logits": logits}
    expected = reference.distill_loss(
        model.hidden_states(tokens[:, :-1]), model.embedding.weight, **arguments, objective=objective
    )
    for form in (teacher, lambda ids: teacher(ids), lambda ids: SimpleNamespace(logits=teacher(ids))):
        assert_same(model, training_loss(model, tokens, teacher=form, objective=objective), expected)
    assert all(p.grad is None for p in teacher.parameters())


def test_autocast():
    model, tokens = tiny(), torch.randint(300, (2, 9))
    loss = training_loss(model, tokens, autocast=torch.bfloat16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, training_loss(model, tokens), rtol=1e-2, atol=0)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_documents_in_a_row_are_apart():
    """Each document of a packed row has the loss it has alone, but for the prediction across its border."""
    model = tiny()
    documents = [torch.randint(300, (n,)) for n in (7, 1, 9)]
    tokens = torch.cat([*documents, torch.randint(300, (1,))])[None]
    seq_idx = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None].int()
    targets = tokens[:, 1:]
    alone = torch.cat([model(d[None])[0] for d in documents])
    expected = F.cross_entropy(alone, targets[0])
    assert_same(model, training_loss(model, tokens, seq_idx), expected)
    with pytest.raises(ValueError, match="only a teacher of this package reads rows of several documents"):
        training_loss(model, tokens, seq_idx, teacher=lambda ids: model(ids))


def test_a_head_that_cannot_be_trained():
    model = tiny(FBILinear)
    with pytest.raises(TypeError, match="a head of type FBILinear"):
        training_loss(model, torch.randint(300, (1, 5)))
