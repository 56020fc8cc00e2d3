import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from bitkernels.checkpoint import CheckpointError, load_checkpoint, read_header, save_checkpoint
from bitkernels.inference import Engine, SamplingParams
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import Int8Embedding, pack_
from bitkernels.training import TrainConfig, train

SHAPE = BiMambaConfig(vocab_size=50, d_model=24, n_layer=2, headdim=8, d_state=12, chunk_size=16, binarize="all")


def embedding(rows, device, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Embedding(rows, 33, device=device, dtype=dtype)


@pytest.mark.parametrize("rows", [7, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_weight_is_within_half_a_step(rows, dtype, device):
    table = embedding(rows, device, dtype)
    with torch.no_grad():
        table.weight[3] = 0
    rounded = Int8Embedding.from_embedding(table)
    exact = table.weight.detach().float()
    assert rounded.weight.abs().max() == 127
    difference = (rounded.weight * rounded.scale[:, None] - exact).abs()
    assert (difference <= 0.5001 * exact.abs().amax(-1, keepdim=True) / 127).all()
    out = rounded(torch.tensor([[1, 3, 6]], device=device))
    assert out.dtype == dtype
    assert out.shape == (1, 3, 33)
    assert not out[0, 1].any()


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_logits(tokens, device):
    rounded = Int8Embedding.from_embedding(embedding(60, device))
    hidden = torch.randn(tokens, 33, device=device)
    table = rounded.weight.double().cpu() * rounded.scale.double().cpu()[:, None]
    assert_close("logits", rounded.logits(hidden), F.linear(hidden.double().cpu(), table))


@torch.no_grad()
def test_model_decodes_with_it(device):
    torch.manual_seed(1)
    model = pack_(BiMambaForCausalLM(SHAPE)).to(device).eval()
    ids = torch.randint(50, (2, 20), device=device)
    exact = model(ids)
    model.round_embedding_()
    full = model(ids)
    # Half a step of 1/127 in each of d_model products, uniformly, and as much in what enters the layers.
    assert_close("rounded", full, exact, 2e-2)
    cache = model.new_cache(2)
    logits = [model.prefill(ids[:, :5], cache), *(model.step(ids[:, t], cache) for t in range(5, 20))]
    assert_close("steps", torch.stack(logits, 1), full[:, 4:])
    engine = Engine(model, 2)
    request = engine.submit(ids[0].tolist(), SamplingParams(max_new_tokens=3, temperature=0))
    assert next(engine.stream(request)) == int(full[0, -1].argmax())


def test_it_is_not_trained():
    config = TrainConfig(steps=1, batch_size=1, length=8)
    with pytest.raises(ValueError, match="train: the embedding is rounded to int8"):
        train(BiMambaForCausalLM(SHAPE).round_embedding_(), torch.randint(50, (100,)), config)


def test_it_is_for_tied_embeddings():
    untied = BiMambaForCausalLM(SHAPE.replace(tie_embeddings=False))
    with pytest.raises(ValueError, match="round_embedding_: the embedding must be full-precision and tied"):
        untied.round_embedding_()
    model = BiMambaForCausalLM(SHAPE).round_embedding_()
    with pytest.raises(ValueError, match="round_embedding_"):
        model.round_embedding_()
    with pytest.raises(ValueError, match="int8_embedding needs tie_embeddings"):
        SHAPE.replace(tie_embeddings=False, int8_embedding=True)


@torch.no_grad()
def test_it_is_stored_as_it_is(tmp_path, device):
    model = pack_(BiMambaForCausalLM(SHAPE)).eval().round_embedding_().set_activation_dtype_(torch.bfloat16)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model)
    loaded = load_checkpoint(path, device, torch.bfloat16).model
    assert loaded.config.int8_embedding
    assert loaded.embedding.weight.dtype == torch.int8
    ids = torch.randint(50, (2, 20), device=device)
    assert torch.equal(loaded(ids), model.to(device)(ids))
    header = read_header(path)
    assert header["embedding.weight"]["dtype"] == "I8"
    data = path.read_bytes().replace(b'"embedding.weight":{"dtype":"I8"', b'"embedding.weight":{"dtype":"U8"')
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="embedding.weight must be I8, got U8"):
        load_checkpoint(path)
