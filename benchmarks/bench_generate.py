"""Tokens a second of generation: a Bi-Mamba with random packed weights against the same model in full precision.

A token is one call: it reads the whole model, which on a GPU is more than its cache holds.
"""

import torch
from harness import Contender, device_of, nbytes

from bitkernels.models import CONFIGS, BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import pack_


def pytest_generate_tests(metafunc):
    cuda = device_of(metafunc.config) == "cuda"
    metafunc.parametrize("size", ["780M", "2.7B"] if cuda else ["small"])
    metafunc.parametrize("B", [1])


def build(size, device, binarize):
    small = BiMambaConfig(vocab_size=2048, d_model=512, n_layer=8)
    config = (CONFIGS[size.lower()] if size != "small" else small).replace(binarize=binarize)
    with torch.device(device):
        model = BiMambaForCausalLM(config).eval()
    if binarize != "none":
        pack_(model)
    if device == "cuda":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
        model.set_activation_dtype_(torch.bfloat16)
    return model


def test_generate(size, B, device, compare):
    models = {binarize: build(size, device, binarize) for binarize in ("all", "none")}

    def contender(name, model):
        cache = model.new_cache(B)
        ids = torch.zeros(B, dtype=torch.long, device=device)

        def make():
            # The state carries over from call to call as it does in generation.
            return lambda: model.step(ids, cache)

        # Bytes: every weight once, the states read and written.
        states = 2 * sum(t.numel() * t.element_size() for t in (*cache.conv, *cache.ssm))
        return Contender(name, make, nbytes(*model.parameters(), *model.buffers()) + states)

    with torch.no_grad():
        assert (
            models["all"]
            .step(torch.zeros(B, dtype=torch.long, device=device), models["all"].new_cache(B))
            .isfinite()
            .all()
        )
        row = compare(f"{size}, B={B}, one token", contender("packed", models["all"]),
                      [contender("bf16 model" if device == "cuda" else "fp32 model", models["none"])],
                      0.0, shape=[B], dtype="bfloat16" if device == "cuda" else "float32", headline=True)  # fmt: skip
        row["tokens/s"] = round(1e6 * B / row["us"], 1)
