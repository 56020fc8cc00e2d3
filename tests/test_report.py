"""The report: sizes against the papers' figures and against files, embeddings, and the whole command."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from bitkernels.checkpoint import save_checkpoint
from bitkernels.cli import app
from bitkernels.data import train_tokenizer
from bitkernels.models import CONFIGS, BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import pack_
from bitkernels.report.runs import read_run
from bitkernels.report.size import full_precision_bytes, packed_bytes, packed_file_bytes, parameter_bits
from bitkernels.report.weights import compare_embeddings, effective_weight, sample_similarities
from bitkernels.training.post_training import round_to_nearest_, ternary_
from bitkernels.training.recipes import RECIPES, build

SHAPE = BiMambaConfig(vocab_size=280, d_model=24, n_layer=2, headdim=8, d_state=12, chunk_size=16)

# In units of 1e8 (Slender-Mamba, Tables 2 and 4), and of GiB at vocabulary 50288 (Bi-Mamba, Table 7).
PUBLISHED_BITS = {
    "mamba-2-untied": 26.8, "slender-mamba-eq": 21.2, "slender-mamba-lq": 8.27, "slender-mamba": 2.69,
    "slender-mamba-sequence": 1.97, "slender-mamba-cycle": 1.97, "slender-mamba-cycle-rev": 1.97,
}  # fmt: skip
PUBLISHED_STORAGE = {"780m": (1.45, 0.22), "1.3b": (2.50, 0.33), "2.7b": (5.03, 0.55)}


@pytest.mark.parametrize("name", PUBLISHED_BITS)
def test_parameter_bits_are_the_papers(name):
    bits = parameter_bits(BiMambaForCausalLM.on_meta(RECIPES[name].config(CONFIGS["170m"])))
    assert bits / 1e8 == pytest.approx(PUBLISHED_BITS[name], rel=0.01)


def test_parameter_bits_of_rounded_models_are_those_of_trained_ones():
    direct = ternary_(build(RECIPES["mamba-2"], SHAPE))
    trained = build(RECIPES["slender-mamba"], SHAPE)
    # The trained one has the norms of its layers besides.
    norms = sum(p.numel() for name, p in trained.named_parameters() if ".norm_" in name or "head.norm" in name)
    mixers = sum(layer.mixer.norm_weight.numel() for layer in trained.layers)
    assert parameter_bits(trained) - parameter_bits(direct) == pytest.approx(16 * (norms - mixers))
    model = build(RECIPES["mamba-2"], SHAPE)
    projections = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    whole = parameter_bits(model)
    in_features = {"in_proj": SHAPE.d_model, "out_proj": SHAPE.d_inner}
    counts = {n: sum(p.numel() for name, p in model.named_parameters() if n in name) for n in in_features}
    scales = sum(count * 32 / in_features[n] for n, count in counts.items())
    assert parameter_bits(round_to_nearest_(model, 3)) == pytest.approx(whole - 13 * projections + scales)


@pytest.mark.parametrize("name", PUBLISHED_STORAGE)
def test_storage_is_the_papers(name):
    shape = CONFIGS[name].replace(vocab_size=50288)
    full, packed = PUBLISHED_STORAGE[name]
    assert full_precision_bytes(shape.replace(binarize="none")) / 2**30 == pytest.approx(full, abs=0.005)
    # The paper's is theoretical, and cut to two digits; a file holds scales, norms and SSM parameters in 32 bits.
    assert packed_bytes(shape) / 2**30 == pytest.approx(packed, abs=0.015)


@pytest.mark.parametrize("name", RECIPES)
def test_packed_bytes_are_those_of_the_file(name, tmp_path):
    model = build(RECIPES[name], SHAPE)
    file = tmp_path / "packed.safetensors"
    save_checkpoint(file, pack_(model), dense_dtype=torch.bfloat16)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert packed_bytes(model.config) == file.stat().st_size - header
    assert packed_file_bytes(model) == file.stat().st_size
    assert packed_file_bytes(BiMambaForCausalLM.on_meta(model.config, packed=True)) == file.stat().st_size


def test_compare_embeddings():
    first, second = torch.randn(300, 8), torch.randn(300, 8)
    a, b = (torch.nn.functional.normalize(t, dim=1).double() for t in (first, second))
    x, y = a @ a.T, b @ b.T
    found = compare_embeddings(first, second)
    pairs = ~torch.eye(300, dtype=torch.bool)
    assert found.l2 == pytest.approx(float((x - y).norm()), rel=1e-4)
    assert found.correlation == pytest.approx(float(torch.corrcoef(torch.stack([x[pairs], y[pairs]]))[0, 1]), abs=1e-5)
    same = compare_embeddings(first, 3 * first)
    assert same.l2 == pytest.approx(0, abs=1e-3)
    assert same.correlation == pytest.approx(1)
    assert torch.equal(*sample_similarities(first, first, 50))
    with pytest.raises(ValueError, match="300 and 299 words"):
        compare_embeddings(first, second[1:])


@torch.no_grad()
def test_effective_weights_are_what_the_layers_compute():
    for name in ("bi-mamba", "bitnet"):
        layer = build(RECIPES[name], SHAPE).layers[0].mixer.in_proj
        weight = effective_weight(layer)
        assert len(weight[:, 0].unique()) <= 3
        if name == "bi-mamba":
            torch.testing.assert_close(layer(torch.eye(24)), weight.T)


@pytest.fixture
def runs(tmp_path):
    tokenizer = train_tokenizer("In the beginning was the word.\n" * 40, SHAPE.vocab_size)
    folders = []
    torch.manual_seed(0)
    for name in ("mamba-2", "bi-mamba", "slender-mamba"):
        recipe, folder = RECIPES[name], tmp_path / "runs" / name
        config = recipe.train_config(20, batch_size=2, length=16, seed=4)
        folder.mkdir(parents=True)
        model = build(recipe, SHAPE.replace(vocab_size=tokenizer.get_vocab_size()))
        save_checkpoint(folder / "model.safetensors", model, tokenizer, training=recipe.record(config))
        if model.config.low_bit:
            save_checkpoint(folder / "packed.safetensors", pack_(model), tokenizer)
        lines = [{"step": step, "loss": 5 - step / 20, "held_out_perplexity": 90 - step} for step in (10, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    return folders


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments), "--device", "cpu"])


def test_the_command_writes_tables_and_pictures(runs, tmp_path):
    pytest.importorskip("matplotlib")
    text, out = tmp_path / "held-out.txt", tmp_path / "out"
    text.write_text("the word was in the beginning\n" * 20)
    result = report(*runs, "--text", text, "--out", out, "--length", 32, "--post-training")
    assert result.exit_code == 0, result.output
    written = {path.name for path in out.iterdir()}
    expected = {"perplexity.png", "frontier.png", "weights-bi-mamba.png", "weights-slender-mamba.png", "embeddings.png"}
    assert written == {"report.md", "report.json", *expected}
    content = (out / "report.md").read_text()
    rows = [line.split(" | ") for line in content.splitlines() if line.startswith("| ")]
    by_recipe = {row[0].removeprefix("| "): row for row in rows if len(row) == 9}
    assert {"mamba-2", "bi-mamba", "slender-mamba", "sign", "rtn-3", "mamba-2-elq"} <= by_recipe.keys()
    assert by_recipe["bi-mamba"][2:4] == ["4", "640"]
    assert by_recipe["rtn-3"][6] == ""
    assert all(math.isfinite(float(by_recipe[name][7])) for name in ("sign", "bi-mamba"))
    assert all(f"({name})" in content for name in expected)
    stored = json.loads((out / "report.json").read_text())
    by_recipe = {row["recipe"]: row for row in stored["rows"]}
    assert (stored["length"], by_recipe["sign"]["run"], by_recipe["bi-mamba"]["tokens"]) == (32, "mamba-2 rounded", 640)
    scores = by_recipe["bi-mamba"]["results"]["held-out"]
    # "the word was in the beginning" and the end of its line are seven words.
    loss = math.log(scores["perplexity"]) * scores["tokens"]
    assert math.log(scores["word_perplexity"]) * 140 == pytest.approx(loss, rel=0.02)


def test_a_report_without_texts_has_what_was_measured_while_training(runs, tmp_path):
    pytest.importorskip("matplotlib")
    result = report(runs[1], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    content = (tmp_path / "out" / "report.md").read_text()
    assert "(perplexity.png)" in content
    assert "(frontier.png)" in content


def test_what_is_no_run(runs, tmp_path):
    run = read_run(runs[0])
    assert run.curve("loss") == ([320, 640], [4.5, 4.0])
    for path, message in (
        (tmp_path, "one trained checkpoint that is not packed, got 0"),
        (runs[1] / "packed.safetensors", "is packed"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run(path)
