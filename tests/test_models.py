"""The Bi-Mamba: one forward against prefill and steps, packed against latent, generation."""

import pytest
import torch
from helpers import assert_close

from bitkernels.models import CONFIGS, BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import BitLinear, FBILinear, PackedLinear, pack_

SHAPE = BiMambaConfig(vocab_size=50, d_model=24, n_layer=2, headdim=8, d_state=12, chunk_size=16)
VARIANTS = {
    "full": {},
    "in_proj": {"binarize": "in_proj"},
    "binary": {"binarize": "all"},
    "binary-row": {"binarize": "all", "scales": "row"},
    "ternary": {"binarize": "all", "weight_format": "ternary"},
    "groups": {"binarize": "all", "ngroups": 2},
    "untied": {"binarize": "all", "tie_embeddings": False},
}
# int8 rounding turns the last bit of a sum into one step of 1/127 now and then.
LOGIT_TOLERANCE = {"ternary": 3e-2}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def make(variant, device="cpu"):
    torch.manual_seed(1)
    return BiMambaForCausalLM(SHAPE.replace(**VARIANTS[variant])).to(device).eval()


def test_binarize_chooses_the_projections():
    kinds = {"full": (torch.nn.Linear,) * 2, "in_proj": (FBILinear, torch.nn.Linear), "ternary": (BitLinear,) * 2}
    for variant, (in_proj, out_proj) in kinds.items():
        mixer = make(variant).layers[0].mixer
        assert type(mixer.in_proj) is in_proj
        assert type(mixer.out_proj) is out_proj


@torch.no_grad()
def test_prefill_and_steps_equal_one_forward(device, variant):
    model = make(variant, device)
    tolerance = LOGIT_TOLERANCE.get(variant, 1e-5)
    ids = torch.randint(50, (2, 12), device=device)
    full = model(ids)
    for prompt in range(1, 9):
        cache = model.new_cache(2)
        logits = [model.prefill(ids[:, :prompt], cache)]
        logits += [model.step(ids[:, t], cache) for t in range(prompt, 12)]
        assert_close(f"prompt {prompt}", torch.stack(logits, 1), full[:, prompt - 1 :], tolerance)
        assert cache.tokens == 12


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(16, 24), (15, 1, 24), (17, 23), (1, 2, 37), (39, 1)])
def test_prefill_continues_across_chunk_borders(device, pieces):
    model = make("binary", device)
    ids = torch.randint(50, (2, 40), device=device)
    full = model(ids)
    cache, begin = model.new_cache(2), 0
    for piece in pieces:
        logits = model.prefill(ids[:, begin : begin + piece], cache)
        begin += piece
        assert_close(f"after {begin}", logits, full[:, begin - 1])


@torch.no_grad()
def test_packed_equals_latent(device, variant):
    model = make(variant, device)
    ids = torch.randint(50, (2, 33), device=device)
    latent = model(ids)
    assert_close("packed", pack_(model)(ids), latent.double(), LOGIT_TOLERANCE.get(variant, 1e-5))


@torch.no_grad()
def test_seq_idx_separates_sequences(device):
    model = make("binary", device)
    first, second = torch.randint(50, (1, 9), device=device), torch.randint(50, (1, 14), device=device)
    seq_idx = torch.tensor([[0] * 9 + [1] * 14], dtype=torch.int32, device=device)
    together = model(torch.cat([first, second], 1), seq_idx)
    assert_close("first", together[:, :9], model(first))
    assert_close("second", together[:, 9:], model(second))


def test_every_parameter_gets_a_gradient(variant):
    model = make(variant).train()
    model(torch.randint(50, (2, 20))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_16_bit_activations(device):
    model = pack_(make("binary", device))
    ids = torch.randint(50, (2, 20), device=device)
    exact = model(ids)
    model.set_activation_dtype_(torch.bfloat16)
    logits = model(ids)
    assert logits.dtype == torch.bfloat16
    assert_close("bf16", logits, exact, 5e-2)
    cache = model.new_cache(2)
    model.prefill(ids[:, :-1], cache)
    assert_close("step", model.step(ids[:, -1], cache), logits[:, -1], 5e-2)


@torch.no_grad()
def test_packed_steps_equal_one_forward(device, variant):
    model = pack_(make(variant, device))
    ids = torch.randint(50, (2, 9), device=device)
    full, cache = model(ids), model.new_cache(2)
    logits = torch.stack([model.prefill(ids[:, :4], cache)] + [model.step(ids[:, t], cache) for t in range(4, 9)], 1)
    assert_close("steps", logits, full[:, 3:], LOGIT_TOLERANCE.get(variant, 1e-5))


@torch.no_grad()
def test_steps_follow_a_change_of_the_decay():
    model = pack_(make("binary"))
    ids = torch.randint(50, (1, 3))
    model.step(ids[:, 0], model.new_cache(1))
    for layer in model.layers:
        layer.mixer.A_log.add_(1.0)
    cache = model.new_cache(1)
    logits = torch.stack([model.step(ids[:, t], cache) for t in range(3)], 1)
    assert_close("steps", logits, model(ids))


def test_cache_size_does_not_grow():
    model = make("binary")
    cache = model.new_cache(3)
    before = cache.nbytes
    model.prefill(torch.randint(50, (3, 30)), cache)
    model.step(torch.randint(50, (3,)), cache)
    assert cache.nbytes == before


def test_named_configurations_have_the_published_shapes():
    assert {name: CONFIGS[name].d_in_proj for name in ("780m", "1.3b", "2.7b")} == {
        "780m": 6448, "1.3b": 8512, "2.7b": 10576,
    }  # fmt: skip
    with torch.device("meta"):
        sizes = {n: sum(p.numel() for p in BiMambaForCausalLM(CONFIGS[n]).parameters()) for n in ("780m", "2.7b")}
    assert 0.7e9 < sizes["780m"] < 0.8e9
    assert 2.5e9 < sizes["2.7b"] < 2.8e9


def test_what_is_kept_of_the_weights_follows_fused_optimisers(device):
    """They count no version of what they change."""
    model, ids = make("binary", device), torch.randint(50, (2, 12), device=device)

    def results(model):
        cache = model.new_cache(2)
        with torch.no_grad():
            return model(ids), model.prefill(ids[:, :-1], cache), model.step(ids[:, -1], cache)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = results(model)
    for _ in range(2):
        model.train()
        model(ids).square().mean().backward()
        optimizer.step()
        while_training = results(model)
        after = results(model.eval())
        same = make("binary", device)
        same.load_state_dict(model.state_dict())
        for found, kept, expected, old in zip(after, while_training, results(same), before, strict=True):
            assert torch.equal(found, expected)
            assert torch.equal(kept, expected)
            assert not torch.equal(found, old)
        before = after


def test_steps_find_what_is_kept_where_it_was():
    """Graphs of steps hold its address."""
    mixer = make("binary").layers[0].mixer
    address = mixer.kept_A().data_ptr()
    with torch.inference_mode():
        mixer.A_log.add_(1.0)
        assert mixer.kept_A().data_ptr() == address
    assert torch.equal(mixer.kept_A(), mixer.A)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_whole_model_compiles(mode):
    ids = torch.randint(50, (2, 12))
    with mode():
        model = make("binary")
        expected = model(ids)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids), expected)


def test_initialisation_is_mamba_2():
    mixer = make("full").layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-4
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert mixer.A.min() >= -16
    assert mixer.A.max() <= -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binarize": "some"}, "binarize must be one of"),
        ({"headdim": 7}, "headdim 7 must divide"),
        ({"n_layer": 0}, "n_layer must be positive"),
        ({"d_model": "24"}, "d_model must be of type int"),
        ({"ngroups": 4}, "ngroups 4 must divide"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        SHAPE.replace(**change)


def test_bad_ids_and_caches():
    model = make("binary")
    with pytest.raises(ValueError, match=r"ids must be integers of shape \[B, T\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(torch.zeros(1, 0, dtype=torch.int64), model.new_cache(1))
    with pytest.raises(ValueError, match="cache holds 2 sequences"):
        model.step(torch.zeros(1, dtype=torch.int64), model.new_cache(2))


def test_packing_replaces_every_projection():
    model = pack_(make("binary"))
    assert all(isinstance(layer.mixer.in_proj, PackedLinear) for layer in model.layers)
    assert all(isinstance(layer.mixer.out_proj, PackedLinear) for layer in model.layers)
