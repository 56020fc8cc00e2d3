"""The command line. Commands import what they need, so that --help answers at once."""

import contextlib
import os
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

# Read when torch loads OpenMP. Threads that spin while they wait make a machine with other work to do many times
# slower, threads that sleep at once are late for the next operator: gcc's spin for a quarter of a millisecond first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    help="1-bit and ternary Mamba-2 language models: train, pack, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class WeightFormat(str, Enum):
    binary = "binary"
    ternary = "ternary"


class Scales(str, Enum):
    column = "column"
    row = "row"
    single = "single"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[Path | None, typer.Argument(help="A checkpoint, packed or not. Default: the model that ships.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU where there is one.")]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text, also .xz. Default: the King James Bible, shipped.")]
Activations = Annotated[Dtype, typer.Option(help="Of embedding and activations.")]
StateDtype = Annotated[Dtype, typer.Option(help="Of the state; 16-bit states are rounded stochastically.")]
Int8 = Annotated[bool, typer.Option(help="Round a tied embedding, which is the head too, to 8 bits a weight.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user can put right is one line on stderr and exit status 1."""
    try:
        yield
    except FileNotFoundError as error:
        _fail(f"{error.filename}: no such file")
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _device(name: str):
    import torch

    from bitkernels.training.run import default_device

    if name == "auto":
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    return torch.device(name)


def _load(path: Path, device: str, dtype: Dtype = Dtype.float32):
    import torch

    from bitkernels.checkpoint import load_checkpoint

    return load_checkpoint(path, _device(device), getattr(torch, dtype.value))


@app.command()
def demo(
    training: Annotated[
        bool,
        typer.Option("--train", help="Train models here; the other options but device, seed and prompt are of this."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the three models are written.")] = Path("runs/demo"),
    text: Text = None,
    device: Device = "auto",
    seed: Seed = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A budget of seconds: shows the steps, learns little.")] = False,
    prompt: Annotated[str, typer.Option(help="What the generated text starts with.")] = "In the beginning",
) -> None:
    """Generate from the 1-bit model that ships, and say what it takes: under a minute on a 2-core CPU.

    With --train: train a teacher, distil a 1-bit student, pack it, and generate from the packed file. About 3 minutes
    on a 2-core CPU, 1 minute on a GPU.
    """
    with _clear_errors():
        from bitkernels.data import shipped_model
        from bitkernels.demo import DemoError, run_demo, show_model

        if not training:
            show_model(Console(), shipped_model(), _device(device), seed, prompt)
            return
        try:
            run_demo(Console(), out, _device(device), text, seed, fast, prompt)
        except DemoError as error:
            _fail(str(error))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")] = Path("runs/model.safetensors"),
    text: Text = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of --text: text files, parquet files or folders of them; encoded once."),
    ] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="As --data, for the perplexity.")] = None,
    cache: Annotated[Path, typer.Option(help="Where encoded --data is kept.")] = Path("runs/cache"),
    tokenizer: Annotated[Path | None, typer.Option(help="Of --data: a JSON file. Default: one is trained.")] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Folder of metrics and checkpoints; a run that was stopped goes on from it."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints of --run-dir.")] = 500,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics of --run-dir.")] = 10,
    recipe: Annotated[
        str | None,
        typer.Option(help="What is low-bit and how it is trained. Default: bi-mamba with --teacher, else mamba-2."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, folder of a transformers model, or folder of stored logits; gives the tokenizer."
        ),
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Random weights, also where a teacher could give them.")
    ] = False,
    config: Annotated[str, typer.Option(help="Named shape: tiny, demo, 22m, 170m, 780m, 1.3b, 2.7b.")] = "demo",
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer that is trained.")] = 512,
    scales: Annotated[Scales, typer.Option(help="Axis of the binary scales.")] = "column",
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 500,
    seconds: Annotated[float | None, typer.Option(help="Train fewer steps where all would take longer.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a step, of all processes together.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Parts that a process does its windows in.")] = 1,
    recompute: Annotated[bool, typer.Option(help="Keep no activations of the blocks.")] = False,
    replicate: Annotated[bool, typer.Option(help="Each process holds the model, instead of a share of it.")] = False,
    capture: Annotated[bool, typer.Option(help="Launch a step as one CUDA graph, where the host is slow.")] = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a training window.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the recipe's.")] = None,
    autocast: Annotated[bool, typer.Option(help="bf16 activations; latent weights stay fp32.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a model by a recipe: a full-precision teacher, or with --teacher a low-bit student.

    A full-precision teacher of this package gives a student its shape, and its weights to start from. Of --text, one
    document in twenty is held out for the perplexity that is shown. Under torchrun, the processes share the model and
    the batch: torchrun --nproc-per-node 2 -m bitkernels.cli train ...
    """
    with _clear_errors():
        import torch

        from bitkernels.checkpoint import save_checkpoint
        from bitkernels.data import read_text, shipped_text
        from bitkernels.models import CONFIGS, BiMambaForCausalLM
        from bitkernels.training import perplexity
        from bitkernels.training.distributed import processes, rank, whole_model
        from bitkernels.training.recipes import build, find_recipe
        from bitkernels.training.run import fit, prepare, prepare_files
        from bitkernels.training.teachers import load_teacher

        chosen = find_recipe(recipe or ("bi-mamba" if teacher else "mamba-2"))
        if config not in CONFIGS:
            raise ValueError(f"--config must be one of {', '.join(CONFIGS)}, got {config!r}")
        if chosen.distils and teacher is None:
            raise ValueError(f"--recipe {chosen.name} learns from a teacher; give one with --teacher")
        if data and (text or not held_out):
            raise ValueError("--data takes the place of --text, and needs --held-out")
        with processes(_device(device)) as where:
            console = Console(quiet=rank() > 0)
            source = load_teacher(teacher, where) if teacher else None
            own = source and source.tokenizer
            if data:
                corpus = prepare_files(data, held_out, cache, own or tokenizer, vocab_size)
            else:
                corpus = prepare(shipped_text() if text is None else read_text(text), own, vocab_size=vocab_size)
            torch.manual_seed(seed)
            ours = source is not None and isinstance(source.model, BiMambaForCausalLM)
            vocabulary = source.vocab_size if source else corpus.tokenizer.get_vocab_size()
            shape = source.model.config if ours else CONFIGS[config].replace(vocab_size=vocabulary)
            start = source.model if ours and not scratch and chosen.can_start else None
            model = build(chosen, shape.replace(scales=scales.value), start).to(where)
            console.print(
                f"{chosen.name}: {chosen.summary}; starts from {'the teacher' if start else 'random weights'}."
            )
            options = {"batch_size": batch_size, "length": length, "seed": seed} | ({} if lr is None else {"lr": lr})
            options |= {"accumulation": accumulation, "recompute": recompute}
            options |= {"replicate": replicate, "capture": capture}
            plan = chosen.train_config(steps, autocast=torch.bfloat16 if autocast else None, **options)
            plan = fit(
                model, corpus, plan, console, "Training", seconds, source.model if chosen.distils else None,
                run, checkpoint_every, log_every,
            )  # fmt: skip
            result = perplexity(model, corpus.held_out, length)
            whole = whole_model(model)
            if rank() == 0:
                training = chosen.record(plan, source.training if start else None)
                save_checkpoint(out, whole, corpus.tokenizer, training=training)
            console.print(f"Wrote {out}; held-out perplexity {result:.4f}.")


@app.command()
def pack(
    file: Annotated[Path, typer.Argument(help="A trained checkpoint with low-bit layers.")],
    out: Annotated[Path | None, typer.Option(help="Default: FILE with .packed before its ending.")] = None,
    dense_dtype: Annotated[
        Dtype, typer.Option(help="What embedding, head and full-precision projections are stored in.")
    ] = Dtype.bfloat16,
    int8_embedding: Int8 = False,
) -> None:
    """Pack a trained checkpoint's low-bit layers to 1 or 2 bits a weight."""
    with _clear_errors():
        import torch

        from bitkernels.checkpoint import save_checkpoint
        from bitkernels.nn import pack_, packed_zeros

        checkpoint = _load(file, "cpu")
        if checkpoint.packed:
            raise ValueError(f"{file}: is packed already")
        if not checkpoint.model.config.low_bit:
            raise ValueError(f"{file}: is a full-precision model; train one with low-bit layers to pack it")
        pack_(checkpoint.model)
        if int8_embedding:
            checkpoint.model.round_embedding_()
        out = out or file.with_name(f"{file.stem}.packed{file.suffix}")
        dtype = getattr(torch, dense_dtype.value)
        save_checkpoint(out, checkpoint.model, checkpoint.tokenizer, dtype, checkpoint.training)
        before, after = file.stat().st_size, out.stat().st_size
        typer.echo(
            f"Wrote {out}: {after / 1e6:.2f} MB from {before / 1e6:.2f} MB; "
            f"{packed_zeros(checkpoint.model)} exact zeros became +1."
        )


@app.command()
def generate(
    file: Model = None,
    prompt: Annotated[str, typer.Option(help="What the text starts with.")] = "In the beginning",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that together reach p.")] = 0.9,
    min_p: Annotated[float, typer.Option(help="Draw from those of at least min_p times the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides the logits of tokens that occurred.")] = 1.15,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    dtype: Activations = Dtype.float32,
    state_dtype: StateDtype = Dtype.float32,
    int8_embedding: Int8 = False,
    device: Device = "auto",
) -> None:
    """Generate text from a checkpoint, as it comes."""
    with _clear_errors():
        import torch

        from bitkernels.data import shipped_model
        from bitkernels.inference import SamplingParams
        from bitkernels.inference.text import stream_text

        sampling = SamplingParams(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed=seed
        )  # fmt: skip
        checkpoint = _load(file or shipped_model(), device, dtype)
        if int8_embedding:
            checkpoint.model.round_embedding_()
        for piece in stream_text(checkpoint, prompt, sampling=sampling, state_dtype=getattr(torch, state_dtype.value)):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


@app.command()
def bench(
    file: Annotated[Path | None, typer.Argument(help="A packed checkpoint. Default: random weights.")] = None,
    config: Annotated[str, typer.Option(help="Named shape of the random weights.")] = "780m",
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for each request.")] = 64,
    dtype: Activations = Dtype.bfloat16,
    state_dtype: StateDtype = Dtype.float32,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of a step.")] = 2048,
    batch_invariant: Annotated[bool, typer.Option(help="Steps of one shape.")] = False,
    int8_embedding: Int8 = False,
    device: Device = "auto",
) -> None:
    """Measure generation: tokens a second, memory, joules a token."""
    with _clear_errors():
        import torch

        from bitkernels.inference.bench import measure, random_model
        from bitkernels.inference.memory import check_memory, plan_memory
        from bitkernels.models import CONFIGS, BiMambaForCausalLM

        where, console = _device(device), Console()
        activations, states = getattr(torch, dtype.value), getattr(torch, state_dtype.value)
        if file is not None:
            model = _load(file, device, dtype).model
        elif config not in CONFIGS:
            raise ValueError(f"--config must be one of {', '.join(CONFIGS)}, got {config!r}")
        else:
            shape = BiMambaForCausalLM.on_meta(CONFIGS[config], packed=True).set_activation_dtype_(activations)
            plan = plan_memory(shape, batch, states, prefill_chunk)
            console.print(f"Will need {plan}.")
            check_memory(plan, where)
            model = random_model(CONFIGS[config], where, activations)
        if int8_embedding:
            model.round_embedding_()
        result = measure(
            model, batch, prompt, new_tokens, states, prefill_chunk=prefill_chunk, batch_invariant=batch_invariant
        )
        if where.type == "cuda":
            name = torch.cuda.get_device_name(where)
        else:
            name = f"CPU, {torch.get_num_threads()} threads, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
        _print_pairs(
            console,
            {
                "model": str(file or f"{config}, random weights"),
                "device": name,
                "prefill": f"{result.prefill_rate:,.1f} tokens/s ({batch} x {prompt})",
                "decode": f"{result.decode_rate:,.1f} tokens/s, {result.step_ms:.3f} ms a step",
                "planned memory": str(result.plan),
                "peak memory": f"{result.peak_bytes / 1e6:,.1f} MB"
                + (" allocated" if where.type == "cuda" else " resident, with torch"),
                "energy": f"{result.joules:.4g} J a token ({result.joules_from})",
            },
        )


@app.command("eval")
def evaluate(
    file: Model = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Default: the held-out part of the shipped text, or what the shipped model has not read."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Read only so many tokens.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 128,
    dtype: Activations = Dtype.float32,
    device: Device = "auto",
) -> None:
    """Perplexity and bits per byte of a checkpoint on held-out text."""
    with _clear_errors():
        from bitkernels.data import read_text, shipped_chapters, shipped_model, shipped_text, split_text
        from bitkernels.training.evaluate import evaluate_text

        unread = split_text(shipped_text())[1] if file else shipped_chapters()[1]
        file = file or shipped_model()
        checkpoint = _load(file, device, dtype)
        if checkpoint.tokenizer is None:
            raise ValueError(f"{file}: holds no tokenizer")
        result = evaluate_text(
            checkpoint.model, checkpoint.tokenizer, read_text(text) if text else unread, length, tokens
        )
        typer.echo(
            f"{file}: perplexity {result.perplexity:.4f} over {result.tokens} tokens, "
            f"{result.bits_per_byte:.4f} bits per byte, {result.word_perplexity:.4f} a word"
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or their trained checkpoints.")],
    text: Annotated[list[Path] | None, typer.Option(help="Held-out text to evaluate on; may be given again.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.md and its pictures.")] = Path("report"),
    post_training: Annotated[
        bool, typer.Option("--post-training", help="Also what becomes of the full-precision runs by rounding alone.")
    ] = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    tokens: Annotated[int | None, typer.Option(min=1, help="Read only so many tokens of a text.")] = None,
    device: Device = "auto",
) -> None:
    """Render the papers' tables and pictures from runs."""
    with _clear_errors():
        from bitkernels.report import write_report

        write_report(runs, text or [], out, _device(device), length, tokens, post_training)
        typer.echo(f"Wrote {out / 'report.md'}")


@app.command()
def info(
    file: Annotated[Path | None, typer.Argument(help="A checkpoint to describe, from its header alone.")] = None,
) -> None:
    """What was built, and with FILE what is in a checkpoint."""
    with _clear_errors():
        from bitkernels import build_info

        contents = {} if file is None else _contents(file)
        console = Console()
        _print_pairs(console, build_info())
        if contents:
            console.print()
            _print_pairs(console, contents)


@app.command()
def explain(
    rows: Annotated[int, typer.Argument(metavar="M", help="Tokens.")],
    out_features: Annotated[int, typer.Argument(metavar="N", help="Rows of the weights.")],
    in_features: Annotated[int, typer.Argument(metavar="K", help="Columns of the weights.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the activations.")] = Dtype.bfloat16,
    weight_format: Annotated[WeightFormat, typer.Option("--format", help="Of the weights.")] = WeightFormat.binary,
    scales: Annotated[Scales, typer.Option(help="Axis of the binary scales.")] = Scales.column,
    act_bits: Annotated[int | None, typer.Option(help="8: int8 activations of ternary weights.")] = None,
    device: Device = "auto",
) -> None:
    """Which kernel a packed matmul of M tokens with weights [N, K] takes, and why."""
    with _clear_errors():
        import torch

        import bitkernels

        line = bitkernels.explain(
            rows, out_features, in_features, getattr(torch, dtype.value), weights=weight_format.value,
            scales=scales.value, act_bits=act_bits, device=_device(device),
        )  # fmt: skip
        typer.echo(line)


def _contents(file: Path) -> dict[str, str]:
    from bitkernels.checkpoint import read_header, read_metadata

    metadata = read_metadata(file)
    tensors = {name: entry for name, entry in read_header(file).items() if name != "__metadata__"}
    by_dtype: dict[str, tuple[int, int]] = {}
    for entry in tensors.values():
        count, size = by_dtype.get(entry["dtype"], (0, 0))
        begin, end = entry["data_offsets"]
        by_dtype[entry["dtype"]] = count + 1, size + end - begin
    contents = ", ".join(f"{count} {dtype} ({size:,} bytes)" for dtype, (count, size) in sorted(by_dtype.items()))
    return {
        "file": f"{file} ({file.stat().st_size:,} bytes)",
        "kind": f"{metadata['kind']}, format version {metadata['format_version']}",
        "tensors": contents,
        "tokenizer": f"{len(metadata['tokenizer']):,} bytes of JSON" if "tokenizer" in metadata else "none",
        **{f"config.{name}": str(value) for name, value in metadata["config"].items()},
        **{f"training.{name}": str(value) for name, value in metadata["training"].items()},
    }


def _print_pairs(console: Console, pairs: dict[str, str]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in pairs.items():
        table.add_row(name, str(value))
    console.print(table)


if __name__ == "__main__":
    app()
