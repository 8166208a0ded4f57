"""Profiles training steps: a trace and a table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from params.disk import write_text

SKIPPED, RECORDED = 5, 3  # steps; the first ones compile and fill the allocator


class Profiler:
    """Records steps 6 to 8 of a run, and writes ``trace.json`` and ``profile.txt``."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.seen = folder, device, 0
        watched = [ProfilerActivity.CPU]
        if device.type == "cuda":
            watched.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=watched)

    def after_step(self) -> str | None:
        """Call after every step. Returns a line once, when the files are written."""
        self.seen += 1
        if self.seen == SKIPPED:
            self._wait()
            self.profile.start()
        if self.seen != SKIPPED + RECORDED:
            return None
        self._wait()
        self.profile.stop()
        trace, table = self.folder / "trace.json", self.folder / "profile.txt"
        self.profile.export_chrome_trace(str(trace))
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        averages = self.profile.key_averages()
        write_text(table, averages.table(sort_by=order, row_limit=60, max_name_column_width=80))
        return f"Profile of {RECORDED} steps in {table} and {trace}"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
