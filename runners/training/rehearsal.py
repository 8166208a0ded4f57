"""The first gradients of a run, computed once for nothing while kernels of theirs are compiled."""

from __future__ import annotations

import logging

import torch

import kernels
from core import Batch
from kernels.attention import attention_flash
from params.tree import Tree
from runners.training.compose import is_compiled
from runners.training.setup import Job, bounds
from runners.training.step import to_device
from runners.training.warming import attentions
from transforms import value_and_grad

_log = logging.getLogger(__name__)
INSTEAD = "torch-varlen"  # an attention that is in torch, compiled


def rehearse(job: Job, params: Tree, batch: Batch) -> bool:
    """Runs the gradients of a CPU batch with torch's attention, and drops them. True if it did.

    So while other processes compile flash-attn 4's kernels, Triton's are compiled here: of a first
    run of 1.5B on an H200 some 5 s, which otherwise come before and after those. It changes nothing
    but what is compiled: training draws no random numbers. Not where torch.compile would write the
    other attention into its programs, nor where that one cannot count so many tokens.
    """
    ahead = attentions(job.config, job.model, job.device, job.spec, bounds(job.spec))
    if is_compiled(job.config, job.device) or any(
        attention_flash.is_large(
            torch.empty(a.tokens, a.heads, a.head_dim, device="meta"), a.documents
        )
        for a in ahead
    ):
        return False
    grad_fn = value_and_grad(job.composed.loss_fn, job.select)
    stream = torch.cuda.Stream(job.device)
    stream.wait_stream(torch.cuda.current_stream(job.device))
    done = False
    try:
        with kernels.override(attention=INSTEAD), torch.cuda.stream(stream):
            grad_fn(params, to_device(batch | {"seed": torch.tensor(0)}, job.device))
        done = True
    except torch.OutOfMemoryError:  # the other attention may need more than the one to come
        _log.warning("The first step takes longer: its rehearsal did not fit into memory")
    stream.synchronize()
    torch.cuda.empty_cache()  # it lies in that stream's pool, of use to no other
    return done
