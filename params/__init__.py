"""What the model holds: pytrees of tensors, their files and sizes."""

from params.init import init_params

__all__ = ["init_params"]
