"""The Triton kernels of the Mamba-2 block, without a GPU."""

from triton_interpreter import run_tests


def test_under_the_interpreter():
    run_tests("register_scan", "interpreted_mixer.py")
