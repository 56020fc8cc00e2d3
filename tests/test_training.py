"""Text, tokenizer, losses, the bigram baseline and the loop."""

import contextlib
import io
import lzma
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bitkernels.data import encode, read_text, shipped_text, split_text, train_tokenizer
from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.nn import FBILinear
from bitkernels.training import BigramModel, Checkpoints, TrainConfig, perplexity, plan_steps, train
from bitkernels.training.run import Corpus, fit, student_of


@pytest.fixture(scope="module")
def text():
    return shipped_text()[:200_000]


@pytest.fixture(scope="module")
def corpus(text):
    train_text, held_out = split_text(text)
    tokenizer = train_tokenizer(train_text, 300)
    return Corpus(encode(tokenizer, train_text), encode(tokenizer, held_out), tokenizer)


def tiny(**changes):
    torch.manual_seed(0)
    config = CONFIGS["tiny"].replace(vocab_size=300, d_model=32, n_layer=1, **changes)
    return BiMambaForCausalLM(config)


def test_the_shipped_text_is_whole():
    text = shipped_text()
    chapters = text.strip("\n").split("\n\n")
    assert len(chapters) == 1189
    assert sum(chapter.count("\n") for chapter in chapters) == 31102
    assert chapters[0].startswith("Genesis 1\nIn the beginning God created")
    assert text.isascii()


def test_split_keeps_whole_chapters_apart():
    chapters = set(shipped_text().strip("\n").split("\n\n"))
    train_text, held_out = split_text(shipped_text())
    kept, held = (set(part.strip("\n").split("\n\n")) for part in (train_text, held_out))
    assert kept | held == chapters
    assert not kept & held
    assert len(held) == 59


@pytest.mark.parametrize("text", ["\n".join(f"line {i}" for i in range(40)), "x" * 400])
def test_any_text_can_be_split(text):
    train_text, held_out = split_text(text)
    assert held_out
    assert len(held_out) < len(train_text) / 10


def test_texts_that_cannot_be_read(tmp_path):
    for name, data, message in (
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("empty.txt", b" \n", "holds no text"),
        ("cut.txt.xz", lzma.compress(b"text" * 100)[:-8], "not a complete xz"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)


def test_tokenizer_gives_any_text_back(corpus):
    for text in ("In the beginning\nGod  created\n\n", "naïve 文字 \t\r\n"):
        assert corpus.tokenizer.decode(encode(corpus.tokenizer, text).tolist()) == text


def test_bigram_is_a_distribution(corpus):
    model = BigramModel(corpus.train, 300)
    first = torch.arange(0, 300, 17)
    every = torch.arange(300)
    for v in first:
        total = model.probability(v.expand(300), every).sum()
        assert float(total) == pytest.approx(1, abs=1e-9)
    unigram = torch.bincount(corpus.train, minlength=300).double() + 1
    unigram_perplexity = math.exp(-float((unigram / unigram.sum()).log()[corpus.held_out[1:]].mean()))
    assert model.perplexity(corpus.held_out) < 0.7 * unigram_perplexity


@torch.no_grad()
def test_perplexity_predicts_every_token_once():
    model = tiny()
    tokens = torch.randint(300, (71,))
    losses = []
    for begin in range(0, 70, 16):
        window = tokens[begin : begin + 17]
        losses.append(torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
    expected = math.exp(float(sum(losses)) / 70)
    assert perplexity(model, tokens, length=16, batch_size=3) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(model, tokens[:1])


def test_training_learns_and_repeats(corpus):
    config = TrainConfig(steps=25, batch_size=4, length=32, lr=5e-3)
    results = []
    for _ in range(2):
        model = tiny()
        before = perplexity(model, corpus.held_out[:1025], 32)
        train(model, corpus.train, config)
        results.append(perplexity(model, corpus.held_out[:1025], 32))
    assert results[0] < 0.6 * before
    assert results[0] == results[1]


def test_perplexity_while_training_is_that_of_the_weights(corpus):
    model, found = tiny(), []

    def on_step(step):
        same = tiny()
        same.load_state_dict(model.state_dict())
        found.append([perplexity(m, corpus.held_out[:100], 32) for m in (model, same)])

    train(model, corpus.train, TrainConfig(steps=4, batch_size=2, length=32, lr=0.1), on_step=on_step)
    assert len({own for own, _ in found}) == 4
    assert all(own == expected for own, expected in found)


def test_steps_are_captured_on_a_gpu_alone(corpus):
    config = TrainConfig(steps=1, batch_size=2, length=16, capture=True)
    with pytest.raises(ValueError, match="capture needs a GPU"):
        train(tiny(), corpus.train, config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_captured_steps_have_the_same_bits(corpus, tmp_path):
    """And a run may go on with captured steps, and without."""
    config = TrainConfig(steps=9, batch_size=4, length=32, lr=5e-3, accumulation=2, autocast=torch.bfloat16)
    captured = replace(config, capture=True)

    def losses(config, checkpoints=None, stop=None):
        """And held-out perplexities, for which nothing may be kept from before a step."""
        model, found = tiny().cuda(), {}

        def on_step(step):
            found[step.done] = float(step.loss), perplexity(model, corpus.held_out[:100], 32)
            if step.done == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            train(model, corpus.train, config, on_step=on_step, checkpoints=checkpoints)
        return found

    expected = losses(config)
    assert losses(captured) == expected
    for first, second in ((captured, config), (config, captured)):
        checkpoints = Checkpoints(tmp_path / str(first.capture), every=4)
        assert losses(first, checkpoints, stop=5) | losses(second, checkpoints) == expected


def test_distillation_moves_the_student_to_the_teacher(corpus):
    teacher = tiny(binarize="none")
    train(teacher, corpus.train, TrainConfig(steps=30, batch_size=4, length=32, lr=5e-3))
    student = student_of(teacher)
    assert isinstance(student.layers[0].mixer.in_proj, FBILinear)
    assert torch.equal(student.layers[0].mixer.in_proj.weight, teacher.layers[0].mixer.in_proj.weight)
    before = [p.clone() for p in teacher.parameters()]
    losses = []
    config = TrainConfig(steps=30, batch_size=4, length=32, lr=3e-3)
    train(student, corpus.train, config, teacher, lambda step: losses.append(float(step.loss)))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    with pytest.raises(ValueError, match="must be full precision"):
        student_of(student)


def test_steps_are_planned_by_the_clock(corpus):
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    config = TrainConfig(steps=10, batch_size=2, length=16)
    assert plan_steps(model, corpus.train, config, seconds=1e6) == 10
    assert plan_steps(model, corpus.train, config, seconds=1e-6) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_fit_shows_loss_and_held_out_perplexity(corpus):
    console = Console(file=io.StringIO(), width=120)
    fit(tiny(), corpus, TrainConfig(steps=2, batch_size=2, length=16), console, "Teacher", seconds=1e-6)
    output = console.file.getvalue()
    assert "1 of 2 steps fit" in output
    assert "loss" in output
    assert "held-out perplexity" in output


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_a_text_shorter_than_a_window():
    with pytest.raises(ValueError, match="a window needs 33"):
        train(tiny(), torch.arange(20), TrainConfig(steps=1, length=32))
