"""What the model is: configs, the forward and its sites, batches, the bridge to nn.Module."""

from core.batch import Batch, check_batch, make_batch, patchify, stack_examples
from core.config import (
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    VLMConfig,
    config_from_dict,
)
from core.foreign.bridge import as_module, from_module
from core.forward import Forward, Rule, Site
from core.model.layers import Logits
from core.model.vlm import Bounds, vlm
from core.presets import PRESETS, preset
from core.sites import SiteInfo

__all__ = [
    "PRESETS",
    "Batch",
    "Bounds",
    "Forward",
    "Logits",
    "ProjectorConfig",
    "Rule",
    "Site",
    "SiteInfo",
    "TextConfig",
    "VLMConfig",
    "VisionConfig",
    "as_module",
    "check_batch",
    "config_from_dict",
    "from_module",
    "make_batch",
    "patchify",
    "preset",
    "stack_examples",
    "vlm",
]
