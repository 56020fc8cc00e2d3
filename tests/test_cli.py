"""The command line, end to end on a toy budget."""

import pytest
from typer.testing import CliRunner

from bitkernels.cli import app
from bitkernels.data import shipped, shipped_text

COMMANDS = ["demo", "train", "pack", "generate", "bench", "eval", "report", "info"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, a student, and the student packed, each made by its command."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text(shipped_text()[:60_000])
    small = ("--text", text, "--steps", 3, "--batch-size", 2, "--length", 32, "--device", "cpu")
    paths = {name: folder / f"{name}.safetensors" for name in ("teacher", "student", "packed")}
    succeed("train", "--config", "tiny", "--vocab-size", 300, "--out", paths["teacher"], *small)
    succeed("train", "--teacher", paths["teacher"], "--out", paths["student"], *small)
    output = succeed("pack", paths["student"], "--out", paths["packed"])
    assert "exact zeros became +1" in output
    return {"text": text, **paths}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    assert command in succeed("--help")
    assert "Usage" in succeed(command, "--help")


def test_packed_evaluates_as_latent(files):
    results = []
    for name in ("student", "packed"):
        output = succeed("eval", files[name], "--text", files["text"], "--tokens", 500, "--device", "cpu")
        results.append(float(output.split("perplexity ")[1].split()[0]))
        assert "bits per byte" in output
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_generate_repeats_with_a_seed(files):
    options = (files["packed"], "--prompt", "And God said", "--max-new-tokens", 12, "--device", "cpu", "--seed", 1)
    first = succeed("generate", *options)
    assert first.startswith("And God said")
    assert first == succeed("generate", *options)


def test_bench_reports(files):
    for source in ([files["packed"]], ["--config", "tiny"]):
        output = succeed("bench", *source, "--prompt", 20, "--new-tokens", 2, "--batch", 2, "--device", "cpu")
        for word in (
            "prefill",
            "decode",
            "tokens/s",
            "planned memory",
            "peak memory",
            "J a token (estimate of the paper",
        ):
            assert word in output
    assert "tokens/s" in succeed("bench", files["packed"], "--int8-embedding", "--prompt", 4, "--new-tokens", 2)
    assert "--config must be one of" in fail("bench", "--config", "huge")


def test_info_tells_what_is_in_a_file(files):
    output = succeed("info", files["packed"])
    for word in ("torch", "packed", "U32", "config.d_model"):
        assert word in output


def test_pack_names_its_output_after_its_input(files):
    succeed("pack", files["student"])
    assert files["student"].with_name("student.packed.safetensors").is_file()


def test_an_embedding_of_8_bits_is_stored(files, tmp_path):
    out = tmp_path / "int8.safetensors"
    succeed("pack", files["student"], "--int8-embedding", "--out", out)
    assert out.stat().st_size < files["packed"].stat().st_size
    assert "I8" in succeed("info", out)
    assert "And" in succeed("generate", out, "--prompt", "And", "--max-new-tokens", 2, "--device", "cpu")
    again = fail("generate", out, "--int8-embedding", "--max-new-tokens", 2, "--device", "cpu")
    assert "the embedding must be full-precision" in again


def test_steps_are_not_captured_on_a_cpu(files, tmp_path):
    options = ("--text", files["text"], "--steps", 1, "--out", tmp_path / "model.safetensors", "--device", "cpu")
    assert "capture needs a GPU" in fail("train", "--capture", *options)


def test_a_ternary_student(files, tmp_path):
    out = tmp_path / "ternary.safetensors"
    succeed(
        "train", "--teacher", files["teacher"], "--recipe", "bitnet", "--text", files["text"], "--steps", 1,
        "--batch-size", 1, "--length", 16, "--out", out, "--device", "cpu",
    )  # fmt: skip
    succeed("pack", out, "--out", out)
    assert "perplexity" in succeed("eval", out, "--text", files["text"], "--tokens", 50, "--device", "cpu")


def test_errors_are_one_clear_line(files, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files["packed"].read_bytes()[:1000])
    for command in ("eval", "generate", "pack", "info"):
        assert "no such file" in fail(command, tmp_path / "absent.safetensors")
        assert "truncated" in fail(command, broken)
    assert "packed already" in fail("pack", files["packed"])
    assert "full-precision model" in fail("pack", files["teacher"])
    assert "no such file" in fail("train", "--text", tmp_path / "absent.txt")
    assert "--config must be one of" in fail("train", "--config", "huge")
    assert "--device must be" in fail("eval", files["packed"], "--device", "tpu")
    assert "must not be empty" in fail("generate", files["packed"], "--prompt", "")
    assert "full precision" in fail("train", "--teacher", files["packed"], "--text", files["text"], "--device", "cpu")


def test_the_shipped_model_is_the_default(files, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED_MODEL", files["packed"])
    output = succeed("demo", "--device", "cpu", "--prompt", "And God said")
    for word in ("packed.safetensors: 0.", "And God said", "tokens/s", "not trained on", "bigram"):
        assert word in output
    assert succeed("generate", "--prompt", "And God said", "--max-new-tokens", 4, "--device", "cpu")
    assert str(files["packed"]) in succeed("eval", "--tokens", 50, "--device", "cpu")


def test_an_installation_without_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED_MODEL", tmp_path / "absent.safetensors")
    for command in ("demo", "generate", "eval"):
        assert "no model ships with this installation" in fail(command, "--device", "cpu")


def test_demo_trains_end_to_end(tmp_path):
    output = succeed("demo", "--train", "--fast", "--out", tmp_path / "demo", "--device", "cpu")
    for word in ("Teacher", "Student", "packed student", "Bigram", "tokens/s"):
        assert word in output
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "teacher.safetensors", "student.safetensors", "packed.safetensors",
    }  # fmt: skip
