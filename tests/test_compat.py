"""The signatures of other packages give what the operators under them give."""

import inspect

import pytest
import torch
from helpers import assert_close, wide

from bitkernels import reference
from bitkernels.compat import mamba_chunk_scan_combined

# As of mamba_ssm 2.3.
PARAMETERS = """x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit
return_final_states return_varlen_states"""


def inputs(device, T=50, H=4, P=16, G=2, N=16):
    shapes = {"x": (1, T, H, P), "dt": (1, T, H), "B": (1, T, G, N), "C": (1, T, G, N)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    return tensors | {"A": -torch.rand(H, device=device), "D": torch.randn(H, device=device)}


def test_signature():
    parameters = inspect.signature(mamba_chunk_scan_combined).parameters
    assert list(parameters) == PARAMETERS.split()
    assert parameters["chunk_size"].default is inspect.Parameter.empty
    assert parameters["dt_limit"].default == (0.0, float("inf"))


def test_values(device):
    given = inputs(device)
    y, final = mamba_chunk_scan_combined(**given, chunk_size=256, dt_softplus=True, return_final_states=True)
    y_ref, final_ref = reference.ssd_scan(**dict(zip(given, wide(*given.values()), strict=True)), dt_softplus=True)
    assert_close("y", y, y_ref)
    assert_close("final_states", final, final_ref)
    assert torch.equal(mamba_chunk_scan_combined(**given, chunk_size=64, dt_softplus=True), y)


def test_cu_seqlens_say_where_states_are_taken(device):
    given = inputs(device)
    ends = torch.tensor([0, 20, 50], dtype=torch.int32, device=device)
    seq_idx = (torch.arange(50, device=device) >= 20).int()[None]
    wide_given = dict(zip(given, wide(*given.values()), strict=True))
    y_ref, states_ref = reference.ssd_scan(**wide_given, cu_seqlens=ends.cpu(), dt_softplus=True)
    options = {"chunk_size": 256, "seq_idx": seq_idx, "cu_seqlens": ends, "dt_softplus": True}
    y, final, states = mamba_chunk_scan_combined(
        **given, **options, return_final_states=True, return_varlen_states=True
    )
    assert_close("y", y, y_ref)
    assert_close("states", states, states_ref)
    assert torch.equal(final, states[-1:])
    y_again, states_again = mamba_chunk_scan_combined(**given, **options, return_varlen_states=True)
    assert torch.equal(y_again, y)
    assert torch.equal(states_again, states)
    # Without return_varlen_states cu_seqlens has no part.
    whole = mamba_chunk_scan_combined(**given, chunk_size=256, cu_seqlens=ends, dt_softplus=True)
    assert_close("y", whole, reference.ssd_scan(**wide_given, dt_softplus=True)[0])


def test_errors(device):
    given = inputs(device)
    with pytest.raises(ValueError, match="cu_seqlens must be given with return_varlen_states"):
        mamba_chunk_scan_combined(**given, chunk_size=256, return_varlen_states=True)
    ends = torch.tensor([0, 50], device=device)
    with pytest.raises(ValueError, match="return_varlen_states needs seq_idx"):
        mamba_chunk_scan_combined(**given, chunk_size=256, cu_seqlens=ends, return_varlen_states=True)
