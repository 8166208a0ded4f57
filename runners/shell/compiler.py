"""A process that compiles one part of an attention for a GPU that it does not open.

Started by `compile_ahead`. flash-attn 4 compiles when it is called, also with tensors that
are none (PyTorch's fake mode), and what its interface then would launch is in its cache.
"""

from __future__ import annotations

import os
from typing import Any

from runners.shell.compile_ahead import Job
from runners.shell.wire import Link


def serve(link: Link) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no context on the GPU, and none of its memory
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels.attention.attention_flash import compile_flash_attn_4

    with FakeTensorMode():  # its first tensors import Dynamo: 0.9 s on a slow core
        torch.empty_like(torch.empty(8, device="cuda"))
    job: Any = link.receive()[0]
    assert isinstance(job, Job)
    os.environ.update(job.environment)
    with FakeTensorMode():
        compile_flash_attn_4(job.part, **job.attention._asdict())
    job.mark.touch()
    link.send(None)
    os._exit(0)  # whoever waits for its end need not wait for the libraries' ends
