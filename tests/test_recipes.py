"""Every recipe: its layers against the reference, training, packing, reloading; sharing, teachers, rounding."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, assert_close
from torch import nn
from typer.testing import CliRunner

from bitkernels import reference
from bitkernels.checkpoint import load_checkpoint, save_checkpoint
from bitkernels.cli import app
from bitkernels.data import Windows, encode, train_tokenizer
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import BitEmbedding, BitLinear, FBILinear, pack_
from bitkernels.nn.ternary import NORM_EPS
from bitkernels.training import TrainConfig, perplexity, train
from bitkernels.training.post_training import POST_TRAINING, least_squares_scales, round_to_nearest, ternary_
from bitkernels.training.recipes import RECIPES, build, find_recipe, start_from_, tokens_read
from bitkernels.training.teachers import StoredLogits, load_teacher, store_logits

SHAPE = BiMambaConfig(vocab_size=50, d_model=24, n_layer=4, headdim=8, d_state=12, chunk_size=16)
# int8 rounding turns the last bit of a sum into one step of 1/127 now and then.
LOGIT_TOLERANCE = {True: 3e-2, False: 1e-5}
SHARED = {
    "sequence": [0, 0, 1, 1, 2, 2], "cycle": [0, 1, 2, 0, 1, 2], "cycle_rev": [0, 1, 2, 2, 1, 0],
    "universal": [0] * 6, "none": [0, 1, 2, 3, 4, 5],
}  # fmt: skip


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(50, (2000,), generator=torch.Generator().manual_seed(1)) // 7 * 7


def make(name, **changes):
    torch.manual_seed(1)
    return build(RECIPES[name], SHAPE.replace(**changes)).eval()


def is_ternary(model):
    return any(isinstance(module, BitLinear | BitEmbedding) for module in model.modules())


def test_every_recipe_trains_packs_reloads_and_evaluates(recipe, tokens, tmp_path):
    torch.manual_seed(0)
    teacher = BiMambaForCausalLM(SHAPE)
    model = build(recipe, SHAPE, teacher if recipe.can_start else None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = recipe.train_config(3, batch_size=2, length=16)
    losses = []
    train(model, tokens, config, teacher if recipe.distils else None, lambda step: losses.append(float(step.loss)))
    assert all(map(math.isfinite, losses))
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged

    files = {name: tmp_path / f"{name}.safetensors" for name in ("latent", "packed")}
    save_checkpoint(files["latent"], model, training=recipe.record(config))
    save_checkpoint(files["packed"], pack_(copy.deepcopy(model)))
    latent, packed = (load_checkpoint(file) for file in files.values())
    assert packed.packed is model.config.low_bit
    assert latent.training["recipe"] == recipe.name
    tolerance = LOGIT_TOLERANCE[is_ternary(model)]
    ids = tokens[:60].view(2, 30)
    with torch.no_grad():
        logits = model(ids)
        assert_close("latent", latent.model(ids), logits)
        assert_close("packed", packed.model(ids), logits, tolerance)
    assert perplexity(packed.model, tokens[:100], 16) == pytest.approx(
        perplexity(model, tokens[:100], 16), rel=tolerance
    )


@torch.no_grad()
def test_caches_of_every_recipe(recipe):
    model = pack_(make(recipe.name))
    # Where layers are shared, a position that took its neighbour's state would be far from this.
    tolerance = LOGIT_TOLERANCE["ternary" in str(recipe.model)]
    ids = torch.randint(50, (2, 12))
    full = model(ids)
    cache = model.new_cache(2)
    assert len(cache.conv) == len(cache.ssm) == SHAPE.n_layer
    logits = [model.prefill(ids[:, :5], cache)] + [model.step(ids[:, t], cache) for t in range(5, 12)]
    assert_close("steps", torch.stack(logits, 1), full[:, 4:], tolerance)


def reference_projection(layer, x):
    if isinstance(layer, FBILinear):
        return reference.sign_linear(x, layer.weight, layer.alpha, layer.beta, layer.bias)
    if isinstance(layer, BitLinear):
        x = F.rms_norm(x, (layer.in_features,), layer.norm_weight, NORM_EPS)
        return reference.ternary_linear_ste(x, layer.weight, layer.bias, layer.act_bits)
    return F.linear(x, layer.weight, layer.bias)


def test_gradients_of_every_recipes_layers(recipe):
    """The layers that the recipe chose, on their own, in float64: output and every gradient as the reference's."""
    model = make(recipe.name)
    mixer = model.layers[0].mixer
    for name, layer in {"in_proj": mixer.in_proj, "out_proj": mixer.out_proj, "head": model.head}.items():
        if layer is None:
            continue
        # The scales of a ternary layer, of weights and activations, are float32 by definition.
        tolerance = TOLERANCE[torch.float32] if isinstance(layer, BitLinear) else None
        wide = copy.deepcopy(layer).double()
        x = torch.randn(3, 5, layer.weight.shape[1], dtype=torch.float64, requires_grad=True)
        leaves = [x, *wide.parameters()]
        out, expected = wide(x), reference_projection(wide, x)
        upstream = torch.randn_like(out)
        assert_close(name, out, expected, tolerance)
        grads = (torch.autograd.grad(y, leaves, upstream) for y in (out, expected))
        for grad, reference_grad in zip(*grads, strict=True):
            assert_close(f"gradient of {name}", grad, reference_grad, tolerance)
    if isinstance(model.embedding, BitEmbedding):
        layer, ids = model.embedding, torch.randint(50, (2, 7))
        leaves = [layer.weight, layer.norm_weight, layer.norm_bias]
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        out, expected = layer(ids), reference.bit_embedding(ids, *wide, NORM_EPS)
        upstream = torch.randn_like(out)
        assert_close("embedding", out, expected)
        grads = torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, wide, upstream.double())
        for grad, reference_grad in zip(*grads, strict=True):
            assert_close("gradient of embedding", grad, reference_grad)


@pytest.mark.parametrize("sharing", SHARED)
def test_sharing_is_the_papers_algorithm(sharing):
    config = SHAPE.replace(n_layer=6, n_unique=3, sharing=sharing)
    assert config.layer_order == SHARED[sharing]
    model = BiMambaForCausalLM(config)
    assert len(model.layers) == 6
    held = list(dict.fromkeys(map(id, model.layers)))
    assert [held.index(id(layer)) for layer in model.layers] == SHARED[sharing]
    assert model.layers[5] is list(model.layers)[5]
    stacked = {name.split(".")[1] for name in model.state_dict() if name.startswith("layers.")}
    assert stacked == {str(i) for i in SHARED[sharing]}


def test_a_shared_stack_compiles():
    model = make("slender-mamba-cycle-rev")
    ids = torch.randint(50, (1, 8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_a_cycle_goes_forward_before_it_goes_back():
    assert SHAPE.replace(n_layer=6, n_unique=2, sharing="cycle_rev").layer_order == [0, 1, 0, 1, 1, 0]
    assert SHAPE.replace(n_layer=5, n_unique=2, sharing="cycle").layer_order == [0, 1, 0, 1, 0]


@torch.no_grad()
def test_a_shared_stack_is_the_stack_of_its_copies():
    shared = make("slender-mamba-cycle-rev")
    plain = BiMambaForCausalLM(shared.config.replace(sharing="none")).eval()
    weights = {name: tensor for name, tensor in shared.state_dict().items() if not name.startswith("layers.")}
    for position, layer in enumerate(shared.layers):
        weights |= {f"layers.{position}.{name}": tensor for name, tensor in layer.state_dict().items()}
    plain.load_state_dict(weights)
    ids = torch.randint(50, (2, 10))
    assert torch.equal(shared(ids), plain(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["slender-mamba", "slender-mamba-lq", "slender-mamba-eq", "bi-mamba-in-proj", "mamba-2"]
)
def test_16_bit_activations(name):
    model = make(name)
    ids = torch.randint(50, (2, 20))
    exact = model(ids)
    for form in (model, pack_(copy.deepcopy(model))):
        logits = form.set_activation_dtype_(torch.bfloat16)(ids)
        assert logits.dtype == form.activation_dtype == torch.bfloat16
        # A head that sees int8 activations multiplies their rounding by bf16's.
        assert_close(name, logits, exact, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ternary_head": True}, "needs tie_embeddings=False"),
        ({"ternary_embedding": 1}, "ternary_embedding must be of type bool"),
        ({"sharing": "some"}, "sharing must be one of"),
        ({"n_unique": 5}, "n_unique 5 must be at most"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        SHAPE.replace(**change)


def test_the_papers_defaults():
    bi_mamba = RECIPES["bi-mamba"].train_config(100_000)
    assert (bi_mamba.lr, bi_mamba.betas, bi_mamba.clip, bi_mamba.weight_decay) == (2.5e-4, (0.9, 0.95), 1.0, 0.0)
    assert bi_mamba.lr_at(1999) == pytest.approx(2.5e-4)
    assert bi_mamba.lr_at(99_999) == pytest.approx(2.5e-5, rel=1e-3)
    slender = RECIPES["slender-mamba"].train_config(4500)
    assert (slender.lr, slender.betas, slender.weight_decay, slender.warmup) == (1.6e-3, (0.9, 0.95), 0.1, 0.1)
    assert RECIPES["bi-mamba"].train_config(100).warmup == 0.1
    assert RECIPES["bi-mamba"].train_config(100, lr=1.0, seed=3).lr == 1.0
    with pytest.raises(ValueError, match="recipe must be one of"):
        find_recipe("bi-mambo")


def test_starting_from_another_shape_is_an_error():
    source = BiMambaForCausalLM(SHAPE)
    with pytest.raises(ValueError, match="in the source"):
        start_from_(make("bi-mamba", d_state=16), source)
    with pytest.raises(ValueError, match="layers are shared"):
        start_from_(make("slender-mamba-cycle"), source)
    with pytest.raises(ValueError, match="full precision"):
        start_from_(make("bi-mamba"), make("bi-mamba"))


class ForeignOutput:
    def __init__(self, logits):
        self.logits = logits


class ForeignTeacher(nn.Module):
    """As a causal language model of the transformers library answers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return ForeignOutput(self.model(ids))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("the quick brown fox jumps over the lazy dog\n" * 50, 300)


def test_teachers_of_every_kind_teach_the_same(tokens, tokenizer, tmp_path):
    torch.manual_seed(0)
    teacher = BiMambaForCausalLM(SHAPE.replace(vocab_size=300)).eval()
    config = TrainConfig(2, batch_size=2, length=8, objective="kl")
    windows = Windows(tokens, config.length, config.seed)
    batches = [windows.batch(2 * step, 2).tokens[:, :-1] for step in range(config.steps)]
    store_logits(tmp_path / "logits", teacher, batches, tokenizer, torch.float32)
    save_checkpoint(tmp_path / "teacher.safetensors", teacher, tokenizer)
    teachers = [
        load_teacher(tmp_path / "teacher.safetensors").model,
        ForeignTeacher(teacher),
        load_teacher(tmp_path / "logits").model,
    ]
    assert isinstance(teachers[2], StoredLogits)
    losses = []
    for model in teachers:
        torch.manual_seed(1)
        student, own = build(RECIPES["bi-mamba-kl"], SHAPE.replace(vocab_size=300)), []
        train(student, tokens, config, model, lambda step, own=own: own.append(float(step.loss)))
        losses.append(own)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    with pytest.raises(ValueError, match="no logits for window 1"):
        teachers[2](torch.stack([batches[0][0], batches[0][0] + 1]))


def test_a_folder_of_the_transformers_library(tokenizer, tmp_path, monkeypatch):
    """With a stand-in for the library, which answers as its causal language models do."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs the transformers library"):
        load_teacher(tmp_path)
    foreign = ForeignTeacher(BiMambaForCausalLM(SHAPE.replace(vocab_size=320)))
    foreign.config = types.SimpleNamespace(vocab_size=320)
    auto = types.SimpleNamespace(from_pretrained=lambda path, local_files_only: foreign if local_files_only else None)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoModelForCausalLM=auto))
    teacher = load_teacher(tmp_path)
    assert teacher.vocab_size == 320
    assert teacher.tokenizer.get_vocab_size() <= 300
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_folder_without_a_tokenizer_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"needs a tokenizer\.json"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("scales", ["column", "row", "single"])
def test_least_squares_scales_are_a_minimum(scales):
    weight = torch.randn(9, 7, dtype=torch.float64)
    weight[:, 2].abs_()  # signs all equal
    signs = torch.where(weight < 0, -1.0, 1.0).double()
    alpha, beta = (scale.requires_grad_() for scale in least_squares_scales(weight, scales))
    error = (alpha * signs + beta - weight).square().sum()
    for grad in torch.autograd.grad(error, [alpha, beta]):
        assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_round_to_nearest_is_near(bits):
    weight = torch.randn(5, 40)
    rounded = round_to_nearest(weight, bits, 16)
    for begin in (0, 16, 32):
        group, own = weight[:, begin : begin + 16], rounded[:, begin : begin + 16]
        step = (group.amax(1) - group.amin(1)) / (2**bits - 1)
        assert ((group - own).abs().amax(1) <= step / 2 * (1 + 1e-5)).all()
        assert all(len(row.unique()) <= 2**bits for row in own)
    with pytest.raises(ValueError, match="group_size"):
        round_to_nearest(weight, bits, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", POST_TRAINING)
def test_post_training(name, tmp_path):
    full = make("mamba-2")
    model = POST_TRAINING[name].apply(copy.deepcopy(full))
    low_bit = [module for module in model.modules() if hasattr(module, "weight_bits")]
    layers = {"mamba-2-eq": 1, "mamba-2-lq": 9, "mamba-2-elq": 10}.get(name, 8)
    assert len(low_bit) == layers
    ids = torch.randint(50, (2, 12))
    assert not torch.equal(model(ids), full(ids))
    save_checkpoint(tmp_path / "file.safetensors", pack_(copy.deepcopy(model)))
    assert_close("reloaded", load_checkpoint(tmp_path / "file.safetensors").model(ids), model(ids))
    if name != "sign":
        return
    with pytest.raises(ValueError, match="must be full precision"):
        ternary_(model)


def test_more_bits_are_nearer():
    full = make("mamba-2").layers[0].mixer.in_proj.weight.detach()
    errors = [float((round_to_nearest(full, bits) - full).square().mean()) for bits in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_the_command_line_trains_a_recipe_from_a_teacher(tmp_path):
    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"document {i} of many words" for i in range(400)))
    small = ("--text", text, "--steps", 2, "--batch-size", 1, "--length", 8, "--device", "cpu")
    teacher = tmp_path / "teacher.safetensors"
    invoke("train", "--config", "tiny", "--vocab-size", 280, "--out", teacher, *small)
    out = tmp_path / "slender.safetensors"
    output = invoke("train", "--recipe", "slender-mamba-cycle", "--teacher", teacher, "--out", out, *small)
    assert "starts from random weights" in output
    output = invoke("train", "--recipe", "bi-mamba-in-proj", "--teacher", teacher, "--out", out, *small)
    assert "starts from the teacher" in output
    assert "bi-mamba-in-proj" in invoke("info", out)
    record = load_checkpoint(out).training
    assert record["start_tokens"] == tokens_read(load_checkpoint(teacher).training) == 16
    assert tokens_read(record) == 32
    invoke("pack", out, "--out", tmp_path / "packed.safetensors")
    assert load_checkpoint(tmp_path / "packed.safetensors").training["recipe"] == "bi-mamba-in-proj"
    assert "give one with --teacher" in invoke("train", "--recipe", "bi-mamba", *small, code=1)
    assert "recipe must be one of" in invoke("train", "--recipe", "none", *small, code=1)
    assert encode(load_checkpoint(out).tokenizer, "word").numel()


@torch.no_grad()
@pytest.mark.parametrize("name", ["slender-mamba", "slender-mamba-cycle-rev", "slender-mamba-universal"])
def test_the_engine_keeps_a_state_for_each_position(name):
    model = pack_(make(name))
    prompts = [torch.randint(50, (length,)).tolist() for length in (3, 7, 5)]
    together = model.generate(prompts, max_new_tokens=8, temperature=0)
    for prompt, new in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in new:
            logits = model(torch.tensor([ids]))[0, -1]
            # int8 rounding may turn the order of two that are as good as equal
            assert logits[token] > logits.max() - 3e-2 * logits.std()
            ids.append(token)
