"""A process that compiles one part of an attention for a GPU that it does not open.

Started by `runners.compile_ahead`. flash-attn 4 compiles when it is called, also with tensors that
are none (PyTorch's fake mode), and what its interface then would launch is in its cache.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from runners.compile_ahead import Job
from runners.data.wire import Link


def serve(link: Link) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no context on the GPU, and none of its memory
    warnings.simplefilter("ignore")  # the library's, of how its kernels are written
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels import dynamo
    from kernels.attention_flash import compile_flash_attn_4

    with FakeTensorMode():  # its first tensors import Dynamo: 0.9 s on a slow core
        torch.empty_like(torch.empty(8, device="cuda"))
    job: Any = link.receive()[0]
    assert isinstance(job, Job)
    os.environ.update(job.environment)
    with dynamo.not_yet():
        import flash_attn.cute  # noqa: F401 - it reads the environment
    # PyTorch warns, below Python, of how the library looks at fake tensors; errors go to the link
    with open(os.devnull, "w") as nowhere, FakeTensorMode():
        os.dup2(nowhere.fileno(), 2)
        compile_flash_attn_4(job.part, **job.attention._asdict())
    job.mark.touch()
    link.send(None)
    os._exit(0)  # whoever waits for its end need not wait for the libraries' ends
