"""The Triton kernels of the Mamba-2 block, without a GPU."""

from triton_interpreter import run_tests


def test_under_the_interpreter():
    run_tests("register_scan", "interpreted_mixer.py")


def test_operators_under_the_interpreter():
    """What the operators promise of shapes, strides and aliases, and what only their own tests have."""
    files = ["test_ssd_scan.py", "test_ssd_step.py", "test_causal_conv1d.py", "test_gated_rms_norm.py"]
    files += ["test_add_rms_norm.py"]
    cases = "opcheck or slots or negative_steps or (norm_alone and 2x3) or "
    cases += "(value_and_gradients and (both-2x3 or (cu_seqlens and float32)))"
    run_tests("register_scan", *files, "-k", f"cpu and ({cases})")
