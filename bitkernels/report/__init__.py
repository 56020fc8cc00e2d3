"""``bitkernels report``: the papers' tables and pictures, from runs on disk."""

from bitkernels.report.render import write_report

__all__ = ["write_report"]
